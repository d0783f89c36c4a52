"""Bad input to samplers: one line that names key and value, before any call of the denoiser; warnings on `.trained`."""

import re
import warnings

import pytest
import torch
from oracles import Gaussian

from fewstep.samplers import ancestral, ddim, dpmpp_2m, edit, encode, heun, inpaint, stochastic, transfer
from fewstep.schedules import Cosine, Trained

NOISE = torch.zeros(4, 3)


class Untouched:
    schedule = Cosine()

    def __call__(self, z, t, cond=None, w=None):
        raise AssertionError("called in spite of bad input")


BAD = [
    ({"steps": 0}, "steps = 0"),
    ({"steps": 2.5}, "steps = 2.5"),
    ({"steps": True}, "steps = True"),
    ({"times": [1.0, 0.0]}, "times has 2 values: 4 steps need 5"),
    ({"times": [0.0, 0.25, 0.5, 0.75, 1.0]}, "times = .* must decrease"),
    ({"times": torch.tensor([1.0, 0.5, 0.5, 0.25, 0.0])}, "times = .* must decrease"),
    ({"times": [999.0, 749.0, 499.0, 249.0, 0.0]}, r"times = .* \[0, 1\]"),
    ({"times": [1.0, float("nan"), 0.5, 0.25, 0.0]}, "times = .*nan"),
    ({"noise": None}, "noise is None"),
    ({"noise": NOISE.half()}, "noise has dtype torch.float16"),
    ({"noise": NOISE.long()}, "noise has dtype torch.int64"),
    ({"noise": torch.zeros(4)}, r"noise has shape \(4,\)"),
    ({"noise": torch.zeros(0, 3)}, r"noise has shape \(0, 3\)"),
    ({"noise": torch.full((4, 3), float("nan"))}, "noise holds NaN"),
    ({"z": torch.full((4, 3), float("inf"))}, "z holds NaN or infinite"),
    ({"cond": torch.zeros(3, dtype=torch.long)}, r"cond has shape \(3,\).*batch, 4"),
    ({"cond": {"y": torch.zeros(4), "text": torch.zeros(1, 7)}}, r"cond\['text'\] has shape \(1, 7\)"),
    ({"cond": {"y": 3}}, r"cond\['y'\] is a int"),
    ({"w": -0.5}, "w = -0.5"),
    ({"w": float("nan")}, "w = nan"),
    ({"w": torch.tensor([0.0, 1.0, float("inf"), 0.0])}, "w = inf"),
    ({"w": torch.tensor([1.0, -2.0, 0.0, 0.0])}, "w = -2"),
    ({"w": torch.ones(4, 1)}, r"w has shape \(4, 1\)"),
    ({"clip": (1.0, -1.0)}, "clip = "),
    ({"seeds": torch.zeros(3, dtype=torch.long)}, r"seeds has shape \(3,\)"),
    ({"seeds": torch.zeros(4)}, "seeds has .*float32"),
]


@pytest.mark.parametrize("sampler", [ddim, stochastic, ancestral, heun, dpmpp_2m], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("bad", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_one_line_before_compute(sampler, bad, message):
    arguments = {"noise": NOISE, "steps": 4} | bad
    with pytest.raises(ValueError, match=message) as caught:
        sampler(Untouched(), **arguments)
    assert "\n" not in str(caught.value)


def trained(**record):
    denoiser = Gaussian(Cosine())
    object.__setattr__(denoiser, "trained", Trained(**record))
    return denoiser


def warned(sampler, denoiser, steps, **arguments):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sampler(denoiser, NOISE, steps, **arguments)
    assert all(w.category is UserWarning and w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


STUDENT = {"kind": "deterministic", "steps": 4, "w_range": (0.0, 4.0)}


def test_a_student_on_its_own_grid_is_silent():
    # a warning that fires where nothing is wrong is soon filtered out
    student = trained(**STUDENT)
    assert not warned(ddim, student, 4, w=torch.tensor([0.0, 4.0, 1.0, 2.0]))
    assert not warned(ddim, student, 4, w=4.0, times=torch.linspace(1, 0, 5))
    assert not warned(ddim, student, 2, times=[0.5, 0.25, 0.0], z=NOISE)  # an edit: from a time of its grid
    assert not warned(ddim, trained(kind="deterministic", steps=2, w_range=(0.0, 0.3)), 2, w=torch.full((4,), 0.3))
    assert not warned(stochastic, trained(**{**STUDENT, "kind": "stochastic"}), 4)
    for sampler in (ddim, stochastic, ancestral, heun, dpmpp_2m):
        assert not warned(sampler, trained(kind="teacher"), 5)
        assert not warned(sampler, trained(kind="guided", w_range=(0.0, 4.0)), 5, w=1.0)


@pytest.mark.parametrize(
    ("steps", "times"), [(8, None), (2, None), (4, [1.0, 0.7, 0.5, 0.25, 0.0]), (2, [1.0, 0.75, 0.0])]
)
def test_steps_that_a_student_was_not_trained_for(steps, times):
    (message,) = warned(ddim, trained(**STUDENT), steps, times=times)
    assert re.search(f"trained for 4 steps .* takes {steps} steps", message)


@pytest.mark.parametrize(("w", "asked"), [(4.5, "4.5"), (torch.tensor([0.0, 1.0, 6.0, 2.0]), "0 to 6")])
def test_w_outside_the_trained_range(w, asked):
    (message,) = warned(ddim, trained(**STUDENT), 4, w=w)
    assert f"w = {asked} lies outside the range [0, 4]" in message


@pytest.mark.parametrize(
    ("kind", "sampler"),
    [("stochastic", ddim), ("deterministic", stochastic), ("deterministic", heun), ("encoder", ancestral)],
)
def test_a_student_of_another_sampler(kind, sampler):
    # a stochastic student's jump is twice as long: ddim on it looks plausible and is wrong
    (message,) = warned(sampler, trained(kind=kind), 4)
    assert repr(kind) in message


def test_encoders_and_edits_are_checked_by_their_own_use():
    # an encoder run forwards, or a decoder run backwards, gives a plausible blur; its own grid must stay silent
    def caught(function, *arguments, **more):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            function(*arguments, **more)
        assert all(w.filename == __file__ for w in found)
        return [str(w.message) for w in found]

    encoder, student = trained(kind="encoder", steps=4), trained(**STUDENT)
    assert not caught(encode, encoder, NOISE, 4)
    assert not caught(encode, trained(kind="teacher"), NOISE, 9)
    assert not caught(transfer, encoder, student, NOISE, 4, None, None)
    assert not caught(edit, student, NOISE, NOISE, 4, 0.5)
    assert not caught(inpaint, student, NOISE, NOISE, 4, mask=torch.ones(4, 1, dtype=torch.bool).expand(4, 3))
    assert "'deterministic'" in caught(encode, student, NOISE, 4)[0]
    assert "trained for 4 steps" in caught(encode, encoder, NOISE, 8)[0]
    assert "'encoder'" in caught(edit, encoder, NOISE, NOISE, 4, 0.5)[0]


def taking_guidance():
    denoiser = Untouched()
    denoiser.takes_guidance = True
    return denoiser


IMAGES = torch.zeros(2, 3, 4, 4)
MASK = torch.zeros(2, 1, 4, 4)
OTHER = Gaussian(Cosine(shift=1.0))
BAD_EDITS = [
    (lambda: ddim(taking_guidance(), NOISE, 4), "w is None"),
    (lambda: encode(taking_guidance(), NOISE, 4), "w is None"),
    (lambda: encode(Untouched(), NOISE, 0), "steps = 0"),
    (lambda: encode(Untouched(), NOISE, 2, times=[1.0, 0.5, 0.0]), "must increase strictly"),
    (lambda: encode(Untouched(), NOISE.half(), 2), "x has dtype torch.float16"),
    (lambda: encode(Untouched(), NOISE, 2, torch.zeros(3)), r"cond has shape \(3,\)"),
    (lambda: transfer(None, Untouched(), NOISE, 4, None, None), "encoder is None"),
    (lambda: transfer(OTHER, Untouched(), NOISE, 4, None, None), "schedule .*reschedule"),
    (lambda: transfer(Untouched(), Untouched(), NOISE, 4, torch.zeros(4), torch.zeros(2)), "cond_to has shape"),
    (lambda: edit(Untouched(), IMAGES, IMAGES, 4, 1.5), r"strength = 1.5: must lie in \[0, 1\]"),
    (lambda: edit(Untouched(), IMAGES, IMAGES, 4, float("nan")), "strength = nan"),
    (lambda: edit(Untouched(), IMAGES, IMAGES, 4, 0.2), "strength = 0.2 of 4 steps leaves no whole step.* 1/4"),
    (lambda: edit(Untouched(), IMAGES, IMAGES[:1], 4, 0.5), "noise has shape"),
    (lambda: edit(taking_guidance(), IMAGES, IMAGES, 4, 0.5), "w is None"),
    (lambda: inpaint(taking_guidance(), IMAGES, IMAGES, 4, mask=MASK), "w is None"),
    (lambda: inpaint(Untouched(), IMAGES, IMAGES, 4, mask=MASK[..., :3]), r"mask has shape \(2, 1, 4, 3\)"),
    (lambda: inpaint(Untouched(), IMAGES, IMAGES, 4, mask=MASK[:, 0]), r"mask has shape \(2, 4, 4\)"),
    (lambda: inpaint(Untouched(), IMAGES, IMAGES, 4, mask=MASK.expand(2, 2, 4, 4)), "mask has shape"),
    (lambda: inpaint(Untouched(), IMAGES, IMAGES, 4, mask=MASK + 0.5), "mask is not binary"),
    (lambda: inpaint(Untouched(), IMAGES, IMAGES, 4, mask=MASK * float("nan")), "mask is not binary"),
]


@pytest.mark.parametrize(("call", "message"), BAD_EDITS, ids=[m for _, m in BAD_EDITS])
def test_bad_edits_are_one_line_before_compute(call, message):
    # Untouched raises if it is called at all
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
