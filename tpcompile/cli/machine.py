"""``tpcompile doctor``: what this machine can do."""

from typing import Any

import click

from tpcompile.cli.program import Verb
from tpcompile.cli.settings import Settings
from tpcompile.errors import BackendUnavailable

PACKAGES = (
    "tpcompile",
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "tensorrt-rtx",
    "transformers",
    "tokenizers",
    "numpy",
)


@click.command(cls=Verb)
@click.option("--target", metavar="T", help="Fail with exit code 3 unless this target can be built here.")
@click.pass_obj
def doctor(settings: Settings, target: str | None) -> None:
    """Say which engines can be built and run here, with versions and hardware."""
    from tpcompile import environment
    from tpcompile.backends import backend

    if target is not None:
        backend(target)  # an unknown name is a usage error, told before the probes
    rows = backend_rows()
    hardware = {**environment.hardware(), "cpus": environment.cpus()}
    versions = {"python": hardware.pop("python"), **environment.versions(PACKAGES)}
    wanted = [row for row in rows if target in (None, row["name"])]
    usable = any(row["ok"] for row in wanted)
    if usable or not settings.json:  # one document only: with --json a failure is the error's
        settings.emit({"backends": rows, "hardware": hardware, "versions": versions}, _text(rows, hardware, versions))
    if not usable:
        raise BackendUnavailable("; ".join(f"{row['name']}: {row['reason']}" for row in wanted), fix=wanted[0]["fix"])


def backend_rows() -> list[dict[str, Any]]:
    """Probe every backend."""
    from tpcompile.backends import backends

    rows = []
    for name, found in backends().items():
        state = found.probe()
        facts = {
            "version": state.version,
            "devices": list(state.devices),
            "reason": state.reason,
            "fix": state.fix,
            "note": state.note,
        }
        rows.append({"name": name, "ok": state.ok, **facts})
    return rows


def backend_text(rows: list[dict[str, Any]]) -> str:
    """One line per backend."""
    lines = []
    for row in rows:
        state = (
            " ".join(["ok", row["version"], ", ".join(row["devices"])]).strip()
            if row["ok"]
            else f"no: {row['reason']}; {row['fix']}"
        )
        lines.append("; ".join(filter(None, [f"{row['name']:<12} {state}", row["note"]])))
    return "\n".join(lines)


def _text(rows: list[dict[str, Any]], hardware: dict[str, Any], versions: dict[str, str]) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in versions.items())
    isa = " ".join(hardware["isa"]) or "unknown"
    cpu = f"{hardware['cpu'] or hardware['machine']}, {hardware['cpus']} usable, {isa}"
    return f"{backend_text(rows)}\n{'cpu':<12} {cpu}\n{'versions':<12} {facts}"
