import pytest
import torch

from locfast.kernels.philox import philox


def hexadecimal(words: torch.Tensor) -> list[str]:
    return [f"{int(w):08x}" for w in words]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known answers that the generator's authors publish with Random123 (kat_vectors, philox4x32 10)
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_reference_gives_the_published_words(counter, key, words):
    assert hexadecimal(philox(torch.tensor(counter), key)) == words.split()


def test_triton_gives_the_same_bits(device):
    triton = pytest.importorskip("locfast.kernels.philox.triton")
    counter = torch.randint(0, 2**32, (300, 4), generator=torch.Generator().manual_seed(0)).to(device)
    counter[0], counter[1] = 0, 2**32 - 1
    for key in [(0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (0x12345678, 0x9ABCDEF0)]:
        assert torch.equal(triton.philox(counter, key), philox(counter, key))


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bits_as_the_cpu():
    counter = torch.randint(0, 2**32, (1000, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(philox(counter.cuda(), (1, 2)).cpu(), philox(counter, (1, 2)))
