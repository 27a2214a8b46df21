"""Builds kdfast._C: C++ once per instruction set, CUDA where nvcc is, everything in parallel by ninja.

Environment: KDFAST_EXTENSION=0|1 (skip it | fail rather than install without), KDFAST_CUDA=0|1 (the same for
CUDA), TORCH_CUDA_ARCH_LIST (default "8.0;9.0;9.0+PTX"), MAX_JOBS, CUDA_HOME, CXX.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = "0x020b000000000000"  # the oldest torch whose stable ABI is used: 2.11
CXX_FLAGS = "-std=c++20 -O3 -fPIC -fno-math-errno -fno-trapping-math -fvisibility=hidden -Wall -Wextra"
AVX2_FLAGS = "-mavx2 -mfma -mf16c"
AVX512_FLAGS = f"-mavx512f -mavx512bw -mavx512dq -mavx512vl {AVX2_FLAGS} -mprefer-vector-width=512"
# GCC 12 warns about its own AVX-512 header; clang does not know one of the two names.
AVX512_FLAGS += " -Wno-uninitialized -Wno-maybe-uninitialized -Wno-unknown-warning-option"


class CannotBuild(Exception):
    """A part that this machine cannot build, with the reason."""


class BuildFailed(CannotBuild):
    """A part that this machine should be able to build, and that its compiler refuses."""


def switch(name: str) -> str:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        sys.exit(f"{name}={value!r}: use 0, 1 or leave it unset")
    return value


def output_of(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise BuildFailed(f"{' '.join(command)} fails: {errors(result.stderr) or result.returncode}")
    return result.stdout


def errors(output: str) -> str:
    """The first lines of a compiler's output that say what is wrong; all of it was shown already."""
    lines = output.strip().splitlines()
    telling = [line for line in lines if re.search(r"\b(error|fatal|undefined|not found)\b", line)]
    return " / ".join(line.strip() for line in (telling or lines)[:3])


def find_compiler() -> tuple[str, str]:
    """The C++ compiler's command and its version line."""
    if sys.platform == "win32":
        raise CannotBuild("Windows is not supported by this build")
    for compiler in [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]:
        if shutil.which(shlex.split(compiler)[0]):
            return compiler, output_of(*shlex.split(compiler), "--version").splitlines()[0]
    raise CannotBuild("no C++ compiler found (set CXX, or install g++)")


def find_ninja() -> str:
    if importlib.util.find_spec("ninja"):
        import ninja

        packaged = Path(ninja.BIN_DIR) / "ninja"
        if packaged.exists():
            return str(packaged)
    found = shutil.which("ninja")
    if found is None:
        raise CannotBuild("ninja not found (pip install ninja)")
    return found


def find_torch() -> tuple[Path, str]:
    """torch's folder and version, without the seconds that importing it takes."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise CannotBuild(
            "torch is not installed here (install it first, then use pip's --no-build-isolation)"
        )
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (2, 11):
        raise CannotBuild(f"torch {version} is older than 2.11")
    return Path(spec.origin).parent, version


class Cuda:
    """Where nvcc and its toolkit are, and what to compile for."""

    def __init__(self) -> None:
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        self.nvcc = shutil.which(os.path.join(home, "bin", "nvcc") if home else "nvcc")
        if self.nvcc is None:
            raise CannotBuild(
                f"no nvcc in CUDA_HOME={home}" if home else "nvcc not found (CUDA_HOME or PATH)"
            )
        version = re.search(r"V(\d+\.\d+\.\d+)", output_of(self.nvcc, "--version"))
        self.version = version.group(1) if version else "unknown"
        self.root = self._toolkit()
        targets = [self.root, *sorted(self.root.glob("targets/*"))]
        self.include = [t / "include" for t in targets if (t / "include" / "cuda_runtime_api.h").exists()]
        self.lib = [
            t / d for t in targets for d in ("lib64", "lib") if (t / d / "libcudart_static.a").exists()
        ]
        if not self.include or not self.lib:
            raise CannotBuild(f"{self.root} lacks cuda_runtime_api.h or libcudart_static.a")
        wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0;9.0+PTX"
        self.archs = [arch for arch in re.split(r"[;,\s]+", wanted) if arch]
        for arch in self.archs:
            if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
                raise CannotBuild(f"TORCH_CUDA_ARCH_LIST: {arch!r} is not of the form 9.0, 9.0a or 9.0+PTX")

    def _toolkit(self) -> Path:
        # nvcc on PATH may be a link or a wrapper script, so nvcc itself is asked.
        dry = subprocess.run(
            [self.nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
        )
        top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.M)
        return Path(top.group(1)).resolve() if top else Path(self.nvcc).resolve().parent.parent

    def gencode(self) -> str:
        targets = []
        for arch in self.archs:
            number = arch.removesuffix("+PTX").replace(".", "")
            targets.append((number, f"sm_{number}"))
            if arch.endswith("+PTX"):
                targets.append((number, f"compute_{number}"))
        return " ".join(f"-gencode=arch=compute_{n},code={code}" for n, code in dict.fromkeys(targets))


class Manifest:
    """The text of build.ninja. Sources are named relative to the repository, as error messages name them."""

    def __init__(self, build_dir: Path, compiler: str, torch: tuple[Path, str], cuda: Cuda | None) -> None:
        self.dir, self.torch_dir, self.cuda = build_dir, torch[0], cuda
        self.isas = {"generic": ""}
        if platform.machine().lower() in ("x86_64", "amd64"):
            self.isas |= {"avx2": AVX2_FLAGS, "avx512": AVX512_FLAGS}
        includes = [self.torch_dir / "include", Path(sysconfig.get_paths()["include"])]
        if importlib.util.find_spec("pybind11"):  # else the copy among torch's headers
            import pybind11

            includes.insert(0, Path(pybind11.get_include()))
        if cuda:
            includes += cuda.include
        defines = {"TORCH_TARGET_VERSION": TORCH_TARGET}
        defines |= {f"KD_HAVE_{isa.upper()}": "1" for isa in self.isas if isa != "generic"}
        if cuda:
            defines["KD_WITH_CUDA"] = "1"
        flags = [CXX_FLAGS, "-Icsrc", *(f"-isystem {quote(i)}" for i in includes)]
        self.cxx = f"{compiler} {' '.join(flags)} {' '.join(f'-D{k}={v}' for k, v in defines.items())}"
        self.facts = {
            "KD_BUILD_TORCH": torch[1],
            "KD_BUILD_CUDA_VERSION": cuda.version if cuda else "",
            "KD_BUILD_CUDA_ARCHS": ";".join(cuda.archs) if cuda else "",
        }
        # On macOS a module finds torch's and Python's symbols when it is loaded.
        dynamic = (
            "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared -Wl,--no-as-needed"
        )
        libs = [f"-L{quote(self.torch_dir / 'lib')}", "-ltorch", "-ltorch_cpu"]
        if cuda:
            libs += [f"-L{quote(lib)}" for lib in cuda.lib] + ["-lcudart_static", "-ldl", "-lpthread", "-lrt"]
        self.link = f"{compiler} {dynamic} -o $out $in {' '.join(libs)}"

    def text(self) -> str:
        csrc = Path("csrc")
        plain = [csrc / "bindings.cpp", csrc / "ops.cpp"]
        plain += [p for p in sorted(csrc.glob("cpu/*.cpp")) if not p.name.endswith(".simd.cpp")]
        plain += sorted(csrc.glob("cuda/*.cpp")) if self.cuda else []
        edges = [self._edge("cxx", p) for p in plain]
        facts = " ".join(shlex.quote(f'-D{k}="{v}"') for k, v in self.facts.items())
        edges[0] = self._edge("cxx", plain[0], flags=facts)
        if self.cuda:
            edges += [self._edge("nvcc", p) for p in sorted(csrc.glob("cuda/*.cu"))]
        # Lowest instruction set first: of an inline function that several objects hold, the linker keeps the
        # first copy, so no caller meant for an older processor ends up in code compiled for a newer one.
        for isa, flags in self.isas.items():
            for p in sorted(csrc.glob("cpu/*.simd.cpp")):
                edges.append(self._edge("cxx", p, flags=f"{flags} -DKD_ISA={isa}", suffix=f".{isa}"))
        objects = [obj for obj, _ in edges]
        cuda_objects = [obj for obj, text in edges if ": nvcc " in text]
        # ninja starts in this order where it knows no times. What takes longest goes first, so that the last minute has
        # work for every processor: CUDA, then the widest instruction set.
        last_first = edges[::-1]
        started = [edge for edge in last_first if edge[0] in cuda_objects]
        started += [edge for edge in last_first if edge[0] not in cuda_objects]
        return "\n".join(
            [
                "ninja_required_version = 1.5",
                f"builddir = {escape(self.dir)}",
                "rule cxx",
                "  description = $out",
                f"  command = {escape(self.cxx)} $flags -MD -MF $out.d -c $in -o $out",
                "  depfile = $out.d\n  deps = gcc",
                "rule nvcc",
                "  description = $out",
                f"  command = {self._nvcc()}",
                "  depfile = $out.d\n  deps = gcc",
                "rule link",
                "  description = $out",
                f"  command = {self.link.replace(':', '$:')}",
                *(text for _, text in started),
                f"build {escape(self.module)}: link {' '.join(escape(o) for o in objects)}",
                f"build cuda: phony {' '.join(escape(o) for o in cuda_objects)}",
                f"default {escape(self.module)}\n",
            ]
        )

    @property
    def module(self) -> Path:
        return self.dir / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"

    def _edge(self, rule: str, source: Path, flags: str = "", suffix: str = "") -> tuple[Path, str]:
        obj = self.dir / source.relative_to("csrc").with_name(f"{source.name}{suffix}.o")
        return obj, f"build {escape(obj)}: {rule} {escape(source)}\n  flags = {escape(flags)}"

    def _nvcc(self) -> str:
        if not self.cuda:
            return "false"
        host = "-Xcompiler=-fPIC,-fvisibility=hidden"
        command = f"{quote(self.cuda.nvcc)} -std=c++17 -O3 {host} -Xptxas=-v {self.cuda.gencode()} -Icsrc"
        # ptxas reports registers, shared memory and spills of each kernel: kept beside the object.
        # The log of a failed run must not replace that of an object that stays.
        compile_ = f"{escape(command)} -MD -MF $out.d -c $in -o $out > $out.log.new 2>&1"
        return f"{compile_} && mv $out.log.new $out.log || (cat $out.log.new; exit 1)"


def quote(path: object) -> str:
    return shlex.quote(str(path))


def escape(text: object) -> str:
    """For ninja, where ``$`` and, in paths, ``:`` have a meaning."""
    return str(text).replace("$", "$$").replace(":", "$:")


class BuildExtension(build_ext):
    """Builds what can be built, and says what was not and why."""

    def run(self) -> None:
        self.parts: dict[str, dict[str, str]] = {}
        self.facts: dict[str, object] = {
            "python": sys.implementation.cache_tag,
            "platform": sysconfig.get_platform(),
        }
        inplace = self.inplace or getattr(self, "editable_mode", False)
        package = (ROOT if inplace else Path(self.build_lib).resolve()) / "kdfast"
        package.mkdir(parents=True, exist_ok=True)
        target = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        self.outputs = [str(package / "_build.json")]
        try:
            if switch("KDFAST_EXTENSION") == "0":
                raise CannotBuild("KDFAST_EXTENSION=0")
            fresh = shutil.copy2(self._build(), f"{target}.new")
            os.replace(fresh, target)  # a process that has the old module loaded keeps it
            self.outputs.append(str(target))
        except CannotBuild as reason:
            if switch("KDFAST_EXTENSION") == "1":
                sys.exit(f"kdfast: KDFAST_EXTENSION=1, but the extension cannot be built: {reason}")
            target.unlink(missing_ok=True)
            self._skip("extension", reason)
            for part in ("cpu", "cuda"):
                self._skip(part, "no extension")
        self.facts["parts"] = self.parts
        (package / "_build.json").write_text(json.dumps(self.facts, indent=2) + "\n")
        self._report()

    def get_outputs(self) -> list[str]:
        return self.outputs

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def _skip(self, part: str, reason: object) -> None:
        state = "failed" if isinstance(reason, BuildFailed) else "not built"
        self.parts[part] = {"state": state, "detail": str(reason)}

    def _build(self) -> Path:
        compiler, compiler_version = find_compiler()
        ninja, torch = find_ninja(), find_torch()
        self.facts |= {"torch": torch[1], "compiler": compiler_version}
        build_dir = Path("build", "ext", f"{sys.implementation.cache_tag}-torch{torch[1]}".replace("+", "_"))
        self.facts["build_dir"] = build_dir.as_posix()
        cuda = self._find_cuda()

        manifest = Manifest(build_dir, compiler, torch, cuda)
        failure = self._ninja(ninja, manifest)
        if failure and cuda and self._ninja(ninja, manifest, "cuda"):
            if switch("KDFAST_CUDA") == "1":
                sys.exit(f"kdfast: KDFAST_CUDA=1, but nvcc {cuda.version} fails: {errors(failure)}")
            self._skip("cuda", BuildFailed(f"nvcc {cuda.version} fails: {errors(failure)}"))
            manifest = Manifest(build_dir, compiler, torch, None)
            failure = self._ninja(ninja, manifest)
        if failure:
            raise BuildFailed(f"{compiler} fails: {errors(failure)}")
        cuda_part = self.parts.pop("cuda", None)
        self.parts["extension"] = {"state": "built", "detail": f"{compiler_version}, torch {torch[1]}"}
        self.parts["cpu"] = {"state": "built", "detail": ", ".join(manifest.isas)}
        self.parts["cuda"] = cuda_part or {
            "state": "built",
            "detail": f"nvcc {cuda.version} for {', '.join(cuda.archs)}",
        }
        return ROOT / manifest.module

    def _find_cuda(self) -> Cuda | None:
        wanted = switch("KDFAST_CUDA")
        try:
            if wanted == "0":
                raise CannotBuild("KDFAST_CUDA=0")
            return Cuda()
        except CannotBuild as reason:
            if wanted == "1":
                sys.exit(f"kdfast: KDFAST_CUDA=1, but {reason}")
            self._skip("cuda", reason)
            return None

    def _ninja(self, ninja: str, manifest: Manifest, *targets: str) -> str:
        """Runs ninja in the repository's root; returns the output of a failed build, else nothing."""
        directory = ROOT / manifest.dir
        directory.mkdir(parents=True, exist_ok=True)
        build_file = manifest.dir / "build.ninja"
        (ROOT / build_file).write_text(manifest.text())
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        command = [ninja, "-f", build_file.as_posix(), *jobs, *targets]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        return "" if process.wait() == 0 else "".join(lines)

    def _report(self) -> None:
        print("\nkdfast build")
        for name, part in self.parts.items():
            print(f"  {name:<10} {part['state']:<10} {part['detail']}")
        print(flush=True)


os.chdir(ROOT)
setup(
    license="Apache-2.0",
    ext_modules=[Extension("kdfast._C", sources=[])],
    cmdclass={"build_ext": BuildExtension},
)
