"""What the interpreter cannot show: that launches compile as a GPU's runtime would specialise them."""

import json
import os
import subprocess
import sys

import pytest
import torch


@pytest.fixture(scope="module")
def launches() -> list[dict]:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.launches"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_launch_compiles_where_all_its_sizes_are_one(launches):
    attention = ["_forward_kernel", "_backward_q_kernel", "_backward_kv_kernel"]
    others = ["_mask_embeddings_kernel", "_mask_embeddings_backward_kernel", "_quantize_rows_kernel"]
    others += ["_forward_kernel", "_backward_kernel"]
    finish = ["_backward_kernel", "_finish_kernel", "_finish_kernel"]
    prepare = ["_prepare_kernel", "_positives_kernel", "_filter_kernel", "_constants_kernel", "_forward_kernel"]
    others += [*prepare, "_settle_kernel", "_forward_kernel", "_log2_kernel"]
    others += ["_constants_kernel", "_inverse_kernel", *finish]
    others += [*prepare, "_constants_kernel", *finish, "_philox_kernel"]
    assert [launch["kernel"] for launch in launches] == attention + attention + others


def test_options_of_attentions_launches_arrive(launches):
    from locfast.kernels.softcap_attention import triton

    for launch in launches[:3]:
        cut = triton.tiles(launch["kernel"][1:].removesuffix("_kernel"), 8, torch.bfloat16, 1, 90)
        wanted = {"num_warps": cut.num_warps, "num_stages": cut.num_stages, "maxnreg": cut.max_registers, "fused": True}
        assert {name: launch[name] for name in wanted} == wanted
