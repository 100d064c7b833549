"""CUDA kernels, from what cuobjdump prints of a library and from the library that was built here."""

import shutil
from pathlib import Path

import pytest

from locfast.kernels._backend import package_file
from locfast.machine_code import library, sass

NAME = "_ZN7locfast2op37_GLOBAL__N__4b65917a_7_cuda_cu_e728d114forward_kernelIN3c108BFloat16ELi8EEEvPKT_f"
SASS = f"""
Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Common:
  GLOBAL:0
 Function {NAME}:
  REG:40 STACK:16 SHARED:5120 LOCAL:0 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0

\tcode for sm_90a
\t\tFunction : {NAME}
        /*0000*/                   HFMA2.MMA R33, -RZ, RZ, 0, 0 ;       /* 0x0000000000217435 */
                                                                        /* 0x000fe200000001ff */
        /*0010*/              @!P0 HMMA.16816.F32.BF16 R4, R8, R2, R4 ; /* 0x0000000208047235 */
        /*0020*/             @!UPT HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0030*/                   MUFU.TANH R3, R3 ;
        /*0040*/                   MUFU.EX2 R3, R3 ;
        /*0050*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0060*/                   LDG.E.U8 R4, desc[UR4][R2.64] ;
        /*0070*/                   STS [R3], R4 ;
        /*0080*/                   NOP ;
"""
ELF = f"""
arch = sm_90a
.nv.info
\tAttribute:\tEIATTR_MAX_THREADS_NOT_THIS
.nv.info.{NAME}
\t<0x1>
\tAttribute:\tEIATTR_KPARAM_INFO
\tFormat:\tEIFMT_SVAL
\tValue:\tIndex : 0x0\tOrdinal : 0x5\tOffset  : 0x28\tSize    : 0x8
\t<0x2>
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x80 0x2 0x1
"""


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = {
        "--list-elf": "ELF file    1: _C.1.sm_80.cubin\nELF file    2: _C.2.sm_90a.cubin\n",
        "-elf": ELF,
        "-sass": SASS,
    }
    monkeypatch.setattr(sass, "_cuobjdump", lambda file, option, *others: printed[option])


@pytest.mark.usefixtures("printed")
def test_resources_and_instructions_are_read_from_cuobjdump():
    ((_, code, threads),) = library.library_kernels(Path("_C.so"), [90, 100])
    assert (code.arch, code.registers, code.spill_bytes, threads) == (90, 40, 16, 256)
    assert code.static_shared == 4096  # without the system's kilobyte, which cuobjdump counts from sm_90 on
    assert code.uses_shared_memory
    assert code.instructions == {
        "HFMA2": 1,
        "HMMA": 1,
        "HGMMA": 1,
        "MUFU.TANH": 1,
        "MUFU.EX2": 1,
        "LDG.128": 1,
        "LDG": 1,
        "STS": 1,
    }
    assert sass.tensor_core(code.instructions) == {"HGMMA": 1, "HMMA": 1}


@pytest.mark.skipif(not (shutil.which("c++filt") or shutil.which("cu++filt")), reason="no demangler")
def test_names_are_demangled_and_cut():
    assert library.readable([NAME]) == ["op::forward_kernel<BFloat16, 8>"]
    with_enumerator = "_ZN7locfast2op4cuda6kernelIfLNS0_4TanhE1EEEvPT_"
    assert library.readable([with_enumerator]) == ["op::kernel<float, Tanh 1>"]


def test_names_are_readable_without_a_demangler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert library.readable([NAME]) == ["op forward_kernel BFloat16 8"]
    assert library.readable(["plain_name"]) == ["plain_name"]


def test_the_kernels_of_the_built_library_are_all_known():
    pytest.importorskip("triton")
    file = package_file("_C.so")
    if file is None:
        pytest.skip("locfast/_C.so was not built")
    kernels = library.library_kernels(file, [90])
    masks = {name: (code, threads) for name, code, threads in kernels if name.startswith("mask_embeddings")}
    assert masks
    for name, (code, threads) in masks.items():
        assert code.registers > 0 and code.spill_bytes == 0, name
        assert threads == (512 if "backward" in name else 256), name
        assert sum(code.instructions.values()) > 20, name
        # packs of 16 bytes; the sums of a backward's positions are narrower
        if ", 8, " in name or "float, 4, " in name:
            stores = {kind: n for kind, n in code.instructions.items() if kind.startswith("STG")}
            assert set(stores) == {"STG.128"} or "backward" in name, (name, stores)
    losses = {name: code for name, code, _ in kernels if name.startswith("reconstruction_loss")}
    assert losses and all(code.registers > 0 and code.spill_bytes == 0 for code in losses.values())
