"""The choice of a backend: what is listed, what runs, and that a `with` block gives the old choice back."""

import pytest

from fewstep.kernels import available_backends, backend, use_backend


@pytest.fixture
def two_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation "twice" with a Triton implementation, and "once" without."""
    monkeypatch.setattr(backend, "_implementations", {
        "twice": {"reference": lambda: "plain", "triton": lambda: "fused"}, "once": {"reference": lambda: "plain"},
    })


def test_only_what_can_run_is_listed() -> None:
    """A name listed without an implementation would send a user's run to nowhere."""
    assert "reference" in available_backends()
    for name in available_backends():
        with use_backend(name):
            assert callable(backend.implementation("attention"))
    for operation in ("attention", "attention_qkv", "group_norm_silu", "guided_update"):
        assert "reference" in backend._implementations[operation]


@pytest.mark.usefixtures("two_backends")
def test_auto_takes_the_fused_one_and_the_reference_where_there_is_none() -> None:
    assert available_backends() == ("triton", "reference")
    assert backend.implementation("twice")() == "fused"
    assert backend.implementation("once")() == "plain"
    with use_backend("triton"):
        assert backend.implementation("once")() == "plain"


@pytest.mark.usefixtures("two_backends")
def test_a_block_gives_the_previous_choice_back_also_after_an_error() -> None:
    """Else one test or one profile run would decide what all later training uses."""
    with use_backend("reference"):
        with use_backend("triton"):
            assert backend.implementation("twice")() == "fused"
        assert backend.implementation("twice")() == "plain"
        with pytest.raises(KeyError), use_backend("triton"):
            raise KeyError
        assert backend.implementation("twice")() == "plain"
    assert backend.implementation("twice")() == "fused"


@pytest.mark.usefixtures("two_backends")
def test_called_as_a_function_the_choice_stays() -> None:
    before = use_backend("reference")
    assert backend.implementation("twice")() == "plain"
    before.__exit__()
    assert backend.implementation("twice")() == "fused"


def test_unknown_and_absent_backends_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend 'tritan' is unknown; known: auto, cuda, triton, reference"):
        use_backend("tritan")
    monkeypatch.setattr(backend, "_implementations", {"once": {"reference": lambda: "plain"}})
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available here; available: reference"):
        use_backend("cuda")
    assert backend.implementation("once")() == "plain"
