"""Put what was measured of this machine into the hardware catalogue of `llmkern plan`."""

import os

import torch

from ..machine import slug
from ..plan.hardware import Hardware, save_measured
from .profile import Profile


def save(profile: Profile) -> Hardware:
    """Add the machine to the user's catalogue."""
    device = as_hardware(profile)
    save_measured(device)
    return device


def as_hardware(profile: Profile) -> Hardware:
    """Peak rates, bandwidth and memory, as measured; links are not."""
    ceilings, about = profile.ceilings, profile.about
    best = {dtype: max(rates.values()) for dtype, rates in ceilings.flops.items()}
    products = {dtype: rates["matmul"] for dtype, rates in ceilings.flops.items() if "matmul" in rates}
    threads = "" if profile.device == "cuda" else f", {about['threads']} threads"
    return Hardware(
        name=slug(f"measured {about['device']}"),
        title=f"{about['device']}{threads}, as measured",
        flops=best,
        memory=_memory(profile.device),
        bandwidth=ceilings.rate(max(ceilings.bandwidth)),
        matmul=products,
        measured={key: str(about[key]) for key in ("date", "torch", "llmkern")},
        note="measured by llmkern diagnose",
    )


def _memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.get_device_properties().total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
