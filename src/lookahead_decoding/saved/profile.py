"""What steps cost on a machine, kept between processes.

A profile is t(n) of one model on one device. `lookahead tune` measures and saves it, and decoding reads it at a model's
first use. Without one, times come from the first steps of each process.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import platformdirs
import torch
import transformers

from .. import __version__
from .files import replace

FORMAT = 1


@dataclass(frozen=True)
class Machine:
    """All that a step's time depends on: a profile serves this and nothing else.

    Attributes:
        model: fingerprint of its configuration and of the shapes of its weights.
        dtype: as torch names it.
        device: its type, and the processor's name.
        threads: of torch, on a CPU.
        execution: how the step runs, as `Target` takes it.
        batch: sequences of a step.
    """

    model: str
    dtype: str
    device: str
    threads: int
    execution: str
    batch: int
    version: str = __version__
    torch: str = torch.__version__
    transformers: str = transformers.__version__

    @property
    def path(self) -> Path:
        """Where its profile is, in the user's cache folder."""
        name = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:24]
        return Path(platformdirs.user_cache_dir("lookahead-decoding", appauthor=False)) / "profiles" / f"{name}.json"


def machine_of(model: Any, execution: str, batch: int = 1) -> Machine:
    """The machine that a model runs on, with the model itself."""
    shapes = [(name, getattr(p, "released", tuple(p.shape)), str(p.dtype)) for name, p in model.named_parameters()]
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}
    text = json.dumps([config, shapes], sort_keys=True, default=str)
    return Machine(
        model=hashlib.sha256(text.encode()).hexdigest()[:24],
        dtype=str(model.dtype).removeprefix("torch."),
        device=f"{model.device.type}: {device_name(model.device)}",
        threads=torch.get_num_threads(),
        execution=execution,
        batch=batch,
    )


def device_name(device: torch.device) -> str:
    """The processor's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line for line in lines if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def save(machine: Machine, times: Sequence[tuple[int, float]]) -> Path:
    """Write t(n), pairs of rows and seconds; an older profile stays in place until the new one is whole."""
    path = machine.path
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "machine": asdict(machine), "times": [list(pair) for pair in times]}
    replace(path, (json.dumps(content, indent=1) + "\n").encode())
    return path


def load(machine: Machine) -> list[tuple[int, float]] | None:
    """t(n) as it was saved for this machine, or None where there is no profile, or none that can be read."""
    try:
        content = json.loads(machine.path.read_text())
        if content["format"] != FORMAT or content["machine"] != asdict(machine):
            return None
        times = [(int(rows), float(time)) for rows, time in content["times"]]
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return times if times and all(n >= 1 and 0 < t < math.inf for n, t in times) else None
