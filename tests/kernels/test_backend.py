"""The choice of a backend: what is listed, what runs on which tensors, and that a `with` block ends."""

import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from fewstep.kernels import available_backends, backend, use_backend


def _no_long_rows(x: Tensor) -> str | None:
    return "rows longer than 64" if x.shape[-1] > 64 else None


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """"twice" has a Triton and a CUDA implementation, "once" only the reference; this machine has both, as an sm_90."""
    monkeypatch.setattr(backend, "_implementations", {
        "twice": {"reference": lambda x: "plain", "triton": lambda x: "fused", "cuda": lambda x: "native"},
        "once": {"reference": lambda x: "plain"},
    })
    monkeypatch.setattr(backend, "_supports", {("twice", "triton"): _no_long_rows})
    monkeypatch.setattr(backend, "_orders", {})
    monkeypatch.setattr(backend, "_sizes", {"twice": lambda x: (len(x), x.shape[-1])})
    monkeypatch.setattr(backend, "_said", set())
    monkeypatch.setattr(backend, "_table", {})
    monkeypatch.setattr(backend, "INTERPRETED", True)
    monkeypatch.setattr(backend, "arch", lambda index: "sm_90")
    monkeypatch.setattr(backend, "_cuda_absence", lambda operation: None)


@pytest.fixture
def on_gpu() -> Iterator[FakeTensorMode]:
    """Tensors made within have shapes and a CUDA device, and no data."""
    with FakeTensorMode() as mode:
        yield mode


def gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def test_only_what_can_run_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name listed without an implementation or a device would send a user's run to nowhere."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert available_backends() == ("triton", "reference")        # the interpreter
    monkeypatch.setattr(backend, "INTERPRETED", False)
    assert available_backends() == ("reference",)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert available_backends() == ("triton", "cuda", "reference")
    monkeypatch.setattr(backend, "_cuda_absence", lambda operation: "no nvcc")
    assert available_backends() == ("triton", "reference")


def test_auto_is_the_reference_off_the_gpu() -> None:
    """The interpreter is for tests; nobody who sets TRITON_INTERPRET means to train through it."""
    assert backend.dispatch("twice", torch.zeros(3)) == "plain"


@pytest.mark.usefixtures("on_gpu")
def test_auto_on_a_gpu_takes_the_first_that_can() -> None:
    assert backend.dispatch("twice", gpu(3)) == "fused"
    assert backend.dispatch("once", gpu(3)) == "plain"
    backend.declare("twice", ("cuda", "triton", "reference"), lambda x: ())
    assert backend.dispatch("twice", gpu(3)) == "native"


@pytest.mark.usefixtures("on_gpu")
def test_a_fallback_is_warned_about_once_and_a_choice_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """A silent fallback is a silent slow-down; a warning per step hides all others."""
    with pytest.warns(UserWarning, match="twice does not run on triton here: rows longer than 64"):
        assert backend.dispatch("twice", gpu(3, 65)) == "native"
    with warnings.catch_warnings(), caplog.at_level(logging.INFO):
        warnings.simplefilter("error")
        for _ in range(2):
            assert backend.dispatch("twice", gpu(4, 66)) == "native"
            backend.dispatch("twice", gpu(4, 64))
    assert [r.getMessage() for r in caplog.records] == ["twice runs on triton: preferred"]


@pytest.mark.usefixtures("on_gpu")
def test_the_tuning_table_decides_where_it_has_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """By architecture, dtype, layout and sizes, each of which changes what is fastest."""
    entry = {"backend": "cuda", "tier": "cluster"}
    monkeypatch.setattr(backend, "_table", {"twice": {"sm_90": {"bfloat16 contiguous 8x64": entry}}})
    inside = gpu(5, 64, dtype=torch.bfloat16)
    assert backend.explain("twice", inside) == backend.Choice("cuda", "tuning table")
    assert backend.tuned("twice", inside) == entry
    for other in (gpu(5, 64), gpu(4, 64, dtype=torch.bfloat16), gpu(64, 5, dtype=torch.bfloat16).T):
        assert backend.explain("twice", other) == backend.Choice("triton", "preferred")
        assert not backend.tuned("twice", other)
    monkeypatch.setattr(backend, "arch", lambda index: "sm_80")
    assert backend.dispatch("twice", inside) == "fused"
    monkeypatch.setattr(backend, "arch", lambda index: "sm_90")
    monkeypatch.setattr(backend, "_cuda_absence", lambda operation: "no nvcc")
    with pytest.warns(UserWarning, match="twice does not run on cuda here: no nvcc"):
        assert backend.dispatch("twice", inside) == "fused"


def test_a_backend_by_name_runs_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who names a backend measures it: running another would be a false result."""
    with use_backend("triton"):
        assert backend.dispatch("twice", torch.zeros(3)) == "fused"
        assert backend.dispatch("once", torch.zeros(3)) == "plain"
        with pytest.raises(ValueError, match=r"twice: triton cannot run \(2, 65\) float32 cpu: rows longer than 64; "
                                             r'use "reference"'):
            backend.dispatch("twice", torch.zeros(2, 65))
        monkeypatch.setattr(backend, "INTERPRETED", False)
        with pytest.raises(ValueError, match=r"triton cannot run \(3,\) float32 cpu: needs CUDA tensors"):
            backend.dispatch("twice", torch.zeros(3))


def test_forward_mode_takes_the_reference_whatever_was_chosen() -> None:
    """A fused operation would drop the tangent without a word."""
    with use_backend("triton"), forward_ad.dual_level():
        assert backend.explain("twice", torch.zeros(3)).backend == "reference"
        assert backend.dispatch("twice", torch.zeros(3)) == "plain"


def test_a_block_gives_the_previous_choice_back_also_after_an_error() -> None:
    """Else one test or one profile run would decide what all later training uses."""
    x = torch.zeros(3)
    with use_backend("triton"):
        with use_backend("reference"):
            assert backend.dispatch("twice", x) == "plain"
        assert backend.dispatch("twice", x) == "fused"
        with pytest.raises(KeyError), use_backend("reference"):
            raise KeyError
        assert backend.dispatch("twice", x) == "fused"
    assert backend.dispatch("twice", x) == "plain"


def test_called_as_a_function_the_choice_stays() -> None:
    before = use_backend("triton")
    assert backend.dispatch("twice", torch.zeros(3)) == "fused"
    before.__exit__()
    assert backend.dispatch("twice", torch.zeros(3)) == "plain"


def test_unknown_and_absent_backends_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend 'tritan' is unknown; known: auto, triton, cuda, reference"):
        use_backend("tritan")
    monkeypatch.setattr(backend, "_implementations", {"once": {"reference": lambda x: "plain"}})
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available here; available: reference"):
        use_backend("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "_cuda_absence", lambda operation: "nvcc was not found: install it")
    with pytest.raises(RuntimeError, match=r"available: reference \(cuda: nvcc was not found: install it\)"):
        use_backend("cuda")
    assert backend.dispatch("once", torch.zeros(3)) == "plain"


def test_the_choice_is_made_while_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a graph break, for symbolic sizes, with the fallback's warning, and anew when the choice changes."""
    torch._dynamo.reset()
    monkeypatch.setattr(backend, "_implementations", {
        "twice": {"reference": lambda x: x * 1, "triton": lambda x: x * 2, "cuda": lambda x: x * 3},
    })
    monkeypatch.setattr(backend, "_on_gpu", lambda args: True)
    entry = {"float32 contiguous 8x64": {"backend": "cuda"}}
    monkeypatch.setattr(backend, "_table", {"twice": {"sm_90": entry}})
    compiled = torch.compile(lambda x: backend.dispatch("twice", x), fullgraph=True, backend="eager", dynamic=True)
    assert compiled(torch.ones(3, 64)).max() == 2
    assert compiled(torch.ones(7, 64)).max() == 3
    assert compiled(torch.ones(5, 64)).max() == 3
    with pytest.warns(UserWarning, match="twice does not run on triton here: rows longer than 64"):
        assert compiled(torch.ones(7, 65)).max() == 3
    with use_backend("reference"):
        assert compiled(torch.ones(7, 64)).max() == 1


def test_without_triton_there_is_the_reference() -> None:
    """It has no wheels for every platform: the package must import and run without it."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fewstep.kernels as k\n"
        "assert 'triton' not in k.available_backends()\n"
        "assert k.group_norm_silu(torch.randn(2, 4, 3), 2, None, None).shape == (2, 4, 3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_operation_has_a_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for operation in ("attention", "attention_qkv", "group_norm_silu", "guided_update"):
        assert "reference" in backend._implementations[operation]
