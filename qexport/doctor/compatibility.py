"""What can be done with a target here, and whether an engine would load here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qexport.artifact import Artifact
from qexport.doctor.findings import AbilityFinding, ArtifactFinding, EngineFinding, TargetFinding
from qexport.doctor.jetson import Jetson
from qexport.doctor.nvidia import Driver
from qexport.doctor.packages import PACKAGES, RTX_BINDINGS, TORCH2TRT, UNKNOWN, installed_version, mismatch
from qexport.doctor.requirements import Ranges, normalise
from qexport.doctor.tensorrt import MODULES, Tensorrt, install_advice
from qexport.engines import DeviceIdentity, Engine, find_engine, load_engines
from qexport.errors import ArtifactError
from qexport.runtimes.tensorrt_library import CLASSIC
from qexport.target import Ability, Target, find_target

_ABILITIES: tuple[Ability, ...] = ("export", "run", "measure")
_BY_MODULE = {package.module: package for package in (*PACKAGES, TORCH2TRT, RTX_BINDINGS)}
NO_GPU = "no NVIDIA GPU"


@dataclass(frozen=True, slots=True)
class Here:
    """What this machine has, as far as targets depend on it."""

    ranges: Ranges
    tensorrt: Tensorrt | None
    driver: Driver
    jetson: Jetson | None

    def identity(self) -> DeviceIdentity:
        """Return what an engine that is built here would be bound to."""
        library = self.tensorrt.name if self.tensorrt else "none"
        # The builder that works without a GPU takes no notice of one.
        if not self.driver.gpus or self.tensorrt is None or self.tensorrt.flavour != CLASSIC:
            return DeviceIdentity(library=library)
        gpu = self.driver.gpus[0]
        return DeviceIdentity(
            library=library, gpu=gpu.name, compute_capability=gpu.compute_capability, driver=gpu.driver
        )


def check_target(target: Target, here: Here) -> TargetFinding:
    """Say what can be done with a target."""
    return TargetFinding(
        name=target.name,
        summary=target.summary,
        abilities=tuple(_check_ability(target, ability, here) for ability in _ABILITIES),
    )


def check_artifact(artifact: Artifact, folder: Path, here: Here) -> ArtifactFinding:
    """Say whether an artifact would run, its engines first of all.

    Raises:
        QexportError: it is for a target that this qexport does not have.
        ArtifactError: the record of its engines cannot be read.
    """
    target = find_target(artifact.target)
    run = check_target(target, here).ability("run")
    identity = here.identity()
    engines = tuple(
        _check_engine(engine, artifact, folder, identity) for engine in load_engines(folder).engines
    )
    problems = [*run.problems, *(engine.reason for engine in engines if not engine.loads)]
    advice = [run.advice] if run.advice else []
    if MODULES & set(_modules(target, "run")) and not engines:
        problems.append("no engine has been built")
        advice.append(f"qexport build {folder}")
    return ArtifactFinding(
        path=str(folder),
        target=target.name,
        runs=not problems,
        problems=tuple(problems),
        advice="; then ".join(advice),
        here=identity,
        engines=engines,
    )


def _check_engine(
    engine: Engine, artifact: Artifact, folder: Path, identity: DeviceIdentity
) -> EngineFinding:
    """Ask what the runtime asks before it loads an engine."""
    reason = ""
    try:
        find_engine(artifact, folder, engine.role, identity)
    except ArtifactError as error:
        reason = str(error)
    return EngineFinding(role=engine.role, built_for=engine.built_for, loads=not reason, reason=reason)


def _check_ability(target: Target, ability: Ability, here: Here) -> AbilityFinding:
    missing = target.missing(ability)
    problems = [f"missing {', '.join(missing)}"] if missing else []
    unfit = _unfit(target, ability, here.ranges)
    advice = [target.install_command(ability)] if missing or unfit else []
    problems += unfit
    if MODULES & set(_modules(target, ability)):
        # The extras bring the builder for x86-64; what runs engines, and all of a Jetson's, comes from NVIDIA.
        if here.tensorrt is None and (ability == "run" or here.jetson is not None):
            advice.append(install_advice(here.jetson))
        elif here.tensorrt is not None and here.tensorrt.error:
            problems.append(f"TensorRT cannot be used: {here.tensorrt.error}")
        # An engine runs on a GPU, by the classic library; the builder that needs none runs nothing.
        if ability == "run" and not here.driver.gpus:
            problems.append(NO_GPU)
        elif ability == "run" and here.tensorrt is not None and here.tensorrt.flavour != CLASSIC:
            problems.append(f"{here.tensorrt.name} only builds")
    return AbilityFinding(
        ability=ability, possible=not problems, problems=tuple(problems), advice="; then ".join(advice)
    )


def _unfit(target: Target, ability: Ability, ranges: Ranges) -> list[str]:
    """Name the installed packages of an ability that are not of the versions that its extras ask for."""
    extras = target.extra[ability].split(",")
    asked = {one.name: one for extra in extras for one in ranges.needed_by(extra) if one.applies}
    found = []
    for module in _modules(target, ability):
        package = _BY_MODULE.get(module)
        version = installed_version(package) if package else None
        if package is None or version is None or version == UNKNOWN:
            continue
        wanted = next((asked[name] for name in map(normalise, package.names) if name in asked), None)
        if wanted is not None and wanted.specifiers and not wanted.fits(version):
            found.append(f"{module} {version} is installed, tested with {wanted.range}")
        elif wrong := mismatch(package, ranges):
            found.append(wrong)
    return found


def _modules(target: Target, ability: Ability) -> list[str]:
    return [module for either in target.needs[ability] for module in either.split("|")]
