"""Which kernels a device gets for each value of the config's `kernels`."""

from types import SimpleNamespace

import jax
import pytest

from kernels_pallas.backend import MOSAIC_INTERPRETER, XLA, Backend, select_backend

H100, A100, CPU = (
    SimpleNamespace(platform=platform, device_kind=kind)
    for platform, kind in (
        ("gpu", "NVIDIA H100 80GB HBM3"),
        ("gpu", "NVIDIA A100-SXM4-80GB"),
        ("cpu", "cpu"),
    )
)


def test_a_gpu_gets_triton_until_mosaic_is_asked_for():
    assert select_backend("auto", H100) == select_backend("pallas", H100) == Backend("pallas")
    assert select_backend("mosaic", H100) == Backend("pallas", mosaic=True)
    assert select_backend("auto", A100) == Backend("pallas", "a100")
    assert select_backend("auto", CPU) == select_backend("xla", H100) == XLA


def test_mosaic_is_refused_where_it_cannot_run(monkeypatch):
    with pytest.raises(ValueError, match=r"kernels=mosaic is for Hopper .* not for NVIDIA A100"):
        select_backend("mosaic", A100)
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with pytest.raises(ValueError, match=r"from version 0.11.0 on, not .*: use pallas"):
        select_backend("mosaic", CPU)
    monkeypatch.setattr(jax, "__version_info__", MOSAIC_INTERPRETER)
    assert select_backend("mosaic", CPU) == Backend("pallas", interpret=True, mosaic=True)
