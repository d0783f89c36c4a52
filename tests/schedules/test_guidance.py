"""Guidance: the sign and the convention of w, one batched evaluation, and what replaces the condition."""

import pytest
import torch
from torch import Tensor

from fewstep.schedules import Cond, expand, guide, guided_outputs, with_null


def test_w_zero_is_the_conditional_output_and_w_moves_away_from_the_unconditional() -> None:
    """x_w = (1 + w) x_cond - w x_uncond; with Stable Diffusion's scale in its place w = 0 would be unconditional."""
    cond, uncond = torch.randn(3, 2, 2), torch.randn(3, 2, 2)
    assert torch.equal(guide(cond, uncond, 0.0), cond)
    w = torch.tensor([0.0, 1.0, 3.0])
    expected = torch.stack([(1 + v) * c - v * u for v, c, u in zip(w, cond, uncond, strict=True)])
    torch.testing.assert_close(guide(cond, uncond, w), expected)
    torch.testing.assert_close(guide(cond, uncond, 1.0)[1], expected[1])


def test_guidance_of_half_precision_outputs_is_float32() -> None:
    """cond - uncond is a small difference of near equals: in bf16 little of it is left."""
    cond, uncond = torch.randn(2, 5).bfloat16(), torch.randn(2, 5).bfloat16()
    assert torch.equal(guide(cond, uncond, 3.0), guide(cond.float(), uncond.float(), 3.0))


@pytest.mark.parametrize("as_dict", [False, True])
def test_both_branches_come_from_one_call_with_the_right_conditions(as_dict: bool) -> None:
    """Two calls would cost the promised batching; swapped branches would guide away from the class."""
    calls: list[int] = []

    def evaluate(z: Tensor, t: Tensor, cond: Cond) -> Tensor:
        calls.append(len(z))
        y = cond["y"] if isinstance(cond, dict) else cond
        assert isinstance(y, Tensor)
        extra = cond["mask"] if isinstance(cond, dict) else torch.zeros_like(z)
        return z + 100 * expand(y, z) + 10 * expand(t, z) + extra

    z, t, y, mask = torch.randn(3, 2), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([4, 5, 6]), torch.randn(3, 2)
    cond: Cond = {"y": y, "mask": mask} if as_dict else y
    null: Cond = {"y": torch.tensor(10)} if as_dict else torch.tensor(10)
    cond_output, uncond_output = guided_outputs(evaluate, z, t, cond, null)
    assert calls == [6]
    base = z + 10 * t[:, None] + (mask if as_dict else 0)         # a key that null_cond lacks is kept in both branches
    torch.testing.assert_close(cond_output, base + 100 * y[:, None])
    torch.testing.assert_close(uncond_output, base + 1000)


def test_null_condition_is_spread_over_the_batch() -> None:
    text = torch.randn(4, 7, 3)
    for null in (torch.randn(7, 3), torch.randn(1, 7, 3)):
        replaced = with_null({"text": text, "size": torch.ones(4)}, {"text": null}, 4)
        assert isinstance(replaced, dict)
        assert torch.equal(replaced["text"], null.expand(4, 7, 3))
        assert torch.equal(replaced["size"], torch.ones(4))
    alone = with_null(None, torch.tensor(10), 5)
    assert isinstance(alone, Tensor)
    assert alone.tolist() == [10] * 5


@pytest.mark.parametrize(("cond", "null", "message"), [
    (torch.tensor([1]), None, "null_cond is None"),
    (None, torch.tensor(10), "cond is None"),
    ({"y": torch.tensor([1])}, torch.tensor(10), r"cond is a dict with keys \['y'\] and null_cond a tensor"),
    (torch.tensor([1]), {"y": torch.tensor(10)}, r"null_cond a dict with keys \['y'\]"),
])
def test_conditions_that_do_not_fit_are_named(cond: Cond, null: Cond, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        guided_outputs(lambda z, t, c: z, torch.zeros(1, 2), torch.zeros(1), cond, null)
