"""The process that builds one plan: ``python child.py`` with a request on stdin.

It imports the standard library and the bindings, and nothing else: it starts in a moment, what it holds is the builder's, and when the
builder takes the process down with it, only this one is gone. Log lines go to stderr; the result is a JSON file.
"""

import importlib
import json
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpcompile.backends.tensorrt.api import Library, Network, Parser


def logger(library: "Library", errors: list[str]) -> Any:
    """A logger that keeps what is an error, and writes that and warnings to stderr."""

    class Log(library.ILogger):  # type: ignore[misc, name-defined]  # a class of the bindings
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, text: str) -> None:
            if severity <= library.ILogger.ERROR:
                errors.append(text)
            if severity <= library.ILogger.WARNING:
                print(text, file=sys.stderr, flush=True)

    return Log()


def build(library: "Library", request: dict[str, Any]) -> dict[str, Any]:
    """Parse and build.

    Args:
        library: the bindings.
        request: ``model`` and ``plan``, paths; ``profile``, input name -> three shapes; ``capabilities``, names.
    """
    errors: list[str] = []
    begin = time.perf_counter()
    log = logger(library, errors)
    builder = library.Builder(log)
    network = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = library.OnnxParser(network, log)
    plan = None
    refused = [] if parser.parse_from_file(request["model"]) else _refused(parser)
    if not refused:
        config = builder.create_builder_config()
        _capabilities(library, config, request["capabilities"])
        profile = builder.create_optimization_profile()
        for name in _dynamic(network):
            profile.set_shape(name, *request["profile"][name])
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
    if plan is not None and not errors:
        with open(request["plan"], "wb") as file:
            file.write(memoryview(plan))
    return {
        "version": library.__version__,
        "built": plan is not None,
        "refused": refused,
        "errors": errors,
        "layers": network.num_layers,
        "seconds": time.perf_counter() - begin,
        "peak_mb": _peak_mb(),
    }


def _peak_mb() -> float:
    """Most memory since this program began; ``getrusage`` would tell the parent's where that was more, as a child inherits it."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def _refused(parser: "Parser") -> list[list[str]]:
    """Node, op and reason of everything that the parser did not take."""
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    return [[one.node_name(), one.node_operator(), one.desc()] for one in errors] or [["", "", "the parser gave no reason"]]


def _capabilities(library: Any, config: Any, names: list[str]) -> None:
    """Only TensorRT for RTX is told: TensorRT builds for the GPU at hand."""
    if not hasattr(config, "set_compute_capability"):
        return
    config.num_compute_capabilities = len(names)
    for place, name in enumerate(names):
        config.set_compute_capability(getattr(library.ComputeCapability, name.upper()), place)


def _dynamic(network: "Network") -> list[str]:
    """Names of the inputs that have a size which may change."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    return [one.name for one in inputs if -1 in tuple(one.shape)]


def main() -> None:
    """Read the request, build, write the result."""
    request = json.load(sys.stdin)
    result = build(importlib.import_module(request["module"]), request)
    with open(request["result"], "w", encoding="utf-8") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
