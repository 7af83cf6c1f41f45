"""`acpo doctor`: what is installed, which kernels run, and whether they compute what they should."""

from __future__ import annotations

from . import json_option, print_json, print_table, verb

VERDICT = {True: "ok", False: "FAIL", None: "not run"}


def add(verbs) -> None:
    parser = verb(
        verbs, "doctor", "versions, the kernels in use and why, what is not installed, and a self-check of at most ten seconds",
        "acpo doctor --json > doctor.json",
    )  # fmt: skip
    json_option(parser)


def run(options) -> int:
    from .. import environment, selfcheck
    from ..display import output

    versions, machine, kernels, extras = environment.versions(), environment.machine(), environment.kernels(), environment.extras()
    checks = selfcheck.checks()
    good = all(check.ok is not False for check in checks)
    if options.json:
        print_json({
            "ok": good, "versions": versions, "machine": machine, "kernels": [k._asdict() for k in kernels],
            "extras": [e._asdict() for e in extras], "checks": [c._asdict() for c in checks],
        })  # fmt: skip
        return 0 if good else 1
    with output():
        print("  ".join(f"{name} {version}" for name, version in versions.items()))
        print("\n".join(f"{name}: {value}" for name, value in machine.items()))
        print_table(["operation", "runs on", "why"], [[k.operation, k.implementation, k.why] for k in kernels])
        print_table(["optional", "installed", "without it"], [[e.name, e.version or "no", e.cost] for e in extras])
        rows = [[c.operation, c.device, c.result, f"{c.error:.1e}", f"{c.budget:.1e}", VERDICT[c.ok], c.note] for c in _worst(checks)]
        print_table(["self-check", "on", "worst result", "error", "budget", "", ""], rows)
        bad = sorted({f"{c.operation} ({c.device})" for c in checks if c.ok is False})
        if bad:
            print(f"self-check failed: {', '.join(bad)}; rebuild (pip install -e .), or name another instruction set in ACPO_CPU_ISA")
        else:
            print("self-check passed: error against float64 within the budget of the tests")
    return 0 if good else 1


def _worst(checks: list) -> list:
    """Of each operation, on each device and dtype, the result that is nearest to its budget or furthest beyond."""
    worst: dict = {}
    for check in checks:
        key = (check.operation, check.device)
        rank = (check.ok is False, check.error / check.budget if check.budget else 0.0)
        if key not in worst or rank > worst[key][0]:
            worst[key] = (rank, check)
    return [check for _, check in worst.values()]
