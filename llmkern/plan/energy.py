"""Energy and CO2e: kWh = power x time x PUE, and kilograms by the grid.

Patterson et al. 2021, arXiv:2104.10350, section 2.
"""

from dataclasses import dataclass
from difflib import get_close_matches

from ..errors import UserError
from .hardware import Hardware

# grams of CO2e a kWh, 2023: codecarbon 3.3, data/private_infra/global_energy_mix.json (Our World in Data)
GRIDS = {
    "world": 475, "norway": 30, "sweden": 41, "france": 56, "uk": 238, "usa": 369, "germany": 381,
    "china": 582, "poland": 662, "india": 713,
}  # fmt: skip
# Parts of the datasheet's power that training was seen to draw: StarCoder assumes 0.7 (arXiv:2305.06161);
# Patterson et al. measured 330 W a V100 of 300 W with its part of the host (table 4).
LOW, MIDDLE, HIGH = 0.7, 0.9, 1.1
PUE = 1.1  # between 1.08 (PaLM) and 1.12 (OLMo 2); Uptime's survey of all data centres: 1.54


@dataclass(frozen=True)
class Energy:
    """What a run draws.

    Attributes:
        kwh: at the middle of what is known about the power.
        low, high: the range.
        co2e: kilograms, at `kwh`.
        power: watts of a device that were taken; basis: where from.
        pue, grid: the overhead of the building; grams a kWh.
    """

    kwh: float
    low: float
    high: float
    co2e: float
    power: float
    basis: str
    pue: float
    grid: float


def kwh(power: float, device_hours: float, pue: float) -> float:
    """kWh of `device_hours` at `power` watts."""
    return power * device_hours * pue / 1000


def run(device: Hardware, device_hours: float, pue: float = PUE, grid: str | float = "world",
        power: float | None = None) -> Energy | None:  # fmt: skip
    """Energy of a run; None where nobody says what the device draws.

    Args:
        device: of which kind the devices are.
        device_hours: hours times devices.
        pue: power of the building over that of its computers.
        grid: a name out of `GRIDS`, or grams a kWh.
        power: measured watts of a device; takes the place of the datasheet's, and of the range.

    Raises:
        UserError: an unknown grid, or a PUE below 1.
    """
    if pue < 1:
        raise UserError(f"pue is {pue}, expected at least 1: the building's power over its computers'")
    grams = intensity(grid)
    if power is not None:
        middle = low = high = kwh(power, device_hours, pue)
        basis = "given"
    elif device.power is None:
        return None
    else:
        low, middle, high = (kwh(part * device.power, device_hours, pue) for part in (LOW, MIDDLE, HIGH))
        power, basis = MIDDLE * device.power, f"{MIDDLE} of {device.power:.0f} W ({LOW} to {HIGH})"
    return Energy(middle, low, high, middle * grams / 1000, power, basis, pue, grams)


def intensity(grid: str | float) -> float:
    """Grams of CO2e a kWh of a grid, by name or as a number.

    Raises:
        UserError: an unknown name.
    """
    try:
        return float(grid)
    except ValueError:
        key = str(grid).lower()
    if key not in GRIDS:
        near = get_close_matches(key, GRIDS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"expected grams a kWh, or one of {', '.join(GRIDS)}"
        raise UserError(f"grid is {grid!r}, which is not known; {hint}")
    return GRIDS[key]
