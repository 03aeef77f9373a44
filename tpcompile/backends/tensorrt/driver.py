"""What NVIDIA's driver says of this machine, asked through its C library: no package is needed, and none is started."""

import ctypes
from dataclasses import dataclass
from typing import Any

MAJOR, MINOR = 75, 76
"""``CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*``."""


@dataclass(frozen=True)
class Gpus:
    """The driver and the GPUs.

    Attributes:
        cuda: newest CUDA version that the driver supports, such as ``13.0``; empty without a driver.
        devices: name and capability of each GPU, such as ``("NVIDIA L4", "sm89")``.
        reason: why nothing can run; empty where something can.
    """

    cuda: str = ""
    devices: tuple[tuple[str, str], ...] = ()
    reason: str = ""


def gpus(library: str = "libcuda.so.1") -> Gpus:
    """Ask the driver. Never raises."""
    try:
        driver: Any = ctypes.CDLL(library)
    except OSError:
        return Gpus(reason="no NVIDIA driver on this machine")
    if code := driver.cuInit(0):
        return Gpus(reason=f"the NVIDIA driver cannot start (CUDA error {code})")
    version, count = ctypes.c_int(), ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    driver.cuDeviceGetCount(ctypes.byref(count))
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    found = tuple(_device(driver, i) for i in range(count.value))
    return Gpus(cuda, found, "" if found else "the NVIDIA driver sees no GPU")


def _device(driver: Any, number: int) -> tuple[str, str]:
    handle, name, major, minor = ctypes.c_int(), ctypes.create_string_buffer(128), ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(handle), number)
    driver.cuDeviceGetName(name, len(name), handle)
    driver.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, handle)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), MINOR, handle)
    return name.value.decode(errors="replace"), f"sm{major.value}{minor.value}"
