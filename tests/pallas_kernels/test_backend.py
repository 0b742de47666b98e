"""The choice of backends: by platform when lowered, by name, with reasons, and as a table."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import backend as backends
from pallas_kernels.backend import Backend, assume_device_kind, backend_report, clear_choices, dispatch, require_kernels


def only_hopper(shapes, dtypes, device_kind):
    return None if device_kind is None or "H100" in device_kind else f"needs an H100, found {device_kind}"


TABLE = (
    Backend("mosaic_gpu", ("cuda",), only_hopper, lambda x: jnp.sin(x)),
    Backend("xla", None, lambda *_: None, lambda x: jnp.cos(x)),
    Backend("reference", None, lambda *_: None, lambda x: jnp.tanh(x), by_default=False),
)


def call(x, backend=None):
    return dispatch("wave", TABLE, (x,), shapes={"x": x.shape}, dtypes={"x": x.dtype}, backend=backend)


@pytest.fixture(autouse=True)
def no_choices():
    clear_choices()
    yield
    clear_choices()


def test_the_platform_is_chosen_when_lowered():
    traced = jax.jit(call).trace(jnp.zeros(3))
    assert "cosine" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "sine" in (text := traced.lower(lowering_platforms=("cuda",)).as_text()) and "cosine" not in text
    assert "cosine" in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_a_declared_device_is_believed_and_the_report_says_why():
    with assume_device_kind("cuda", "NVIDIA A100"):
        traced = jax.jit(lambda x: call(x)).trace(jnp.zeros(3))  # a new function: the choice is made while tracing
        assert "cosine" in traced.lower(lowering_platforms=("cuda",)).as_text()
        report = backend_report("cuda")
    assert "wave" in report and "-> xla" in report and "not mosaic_gpu: needs an H100, found NVIDIA A100" in report


def test_a_required_kernel_that_does_not_fit_is_an_error():
    with assume_device_kind("cuda", "NVIDIA A100"), require_kernels("cuda"):
        with pytest.raises(ValueError, match="a kernel is required on 'cuda'"):
            call(jnp.zeros(3))
    with require_kernels("cuda"):
        call(jnp.zeros(3))


def test_by_name():
    assert float(call(jnp.zeros(()), "xla")) == 1.0
    assert float(call(jnp.ones(()), "reference")) == pytest.approx(float(jnp.tanh(1.0)))
    with pytest.raises(ValueError, match="backend='fast' is unknown"):
        call(jnp.zeros(3), "fast")


def test_contexts_refuse_unknown_platforms():
    with pytest.raises(ValueError, match="platform='gpu'"), assume_device_kind("gpu", "x"):
        pass
    with pytest.raises(ValueError, match="platform='cpu'"), require_kernels("cpu"):
        pass
    with pytest.raises(ValueError, match="name='fastest'"):
        Backend("fastest", None, lambda *_: None, lambda x: x)


def test_the_version_is_three_integers():
    assert len(backends.jax_version()) == 3
