import pytest

from locfast.demo.compare import differences
from locfast.errors import UserError


def claim(*recalls: float, seeds: tuple[int, ...] = (1, 2, 3)) -> dict:
    runs = [{"after": {"local/linear": {"recall": recall}}} for recall in recalls]
    return {"seeds": list(seeds), "recall": {"local/linear": {}}, "runs": runs}


def test_claims_are_compared_seed_by_seed():
    found = differences(claim(0.5, 0.6, 0.7), claim(0.51, 0.62, 0.73))["local/linear"]
    assert (found["first"], found["second"]) == (pytest.approx(60), pytest.approx(62))
    # differences 1, 2, 3: mean 2, standard deviation 1, t of two degrees of freedom 4.3027
    assert found["change"]["mean"] == pytest.approx(2)
    assert found["change"]["high"] - 2 == pytest.approx(4.3027 / 3**0.5)


def test_claims_of_other_seeds_make_no_pairs():
    with pytest.raises(UserError, match=r"\[1, 2, 3\] and \[1, 2, 4\]"):
        differences(claim(0.5, 0.6, 0.7), claim(0.5, 0.6, 0.7, seeds=(1, 2, 4)))
