// kdfast._C: importing it registers the ops of ops.cpp; its functions say what was built. setup.py gives the
// KD_BUILD_ facts.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "common/isa.h"
#include "cpu/kept_memory.h"
#include "cpu/workspace.h"

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
#ifdef KD_WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cuda_archs"] = KD_BUILD_CUDA_ARCHS;
  info["cuda_version"] = KD_BUILD_CUDA_VERSION;
  info["compiler"] = compiler();
  std::vector<std::string> isas = {"generic"};
  KD_IF_AVX2_(isas.push_back("avx2");)
  KD_IF_AVX512_(isas.push_back("avx512");)
  info["isas"] = isas;
  info["torch_built_with"] = KD_BUILD_TORCH;
  constexpr unsigned long long target = TORCH_TARGET_VERSION;
  info["torch_oldest"] = std::to_string(target >> 56) + "." + std::to_string(target >> 48 & 0xff);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "kdfast's compiled ops; importing this module registers them with torch.";
  m.def("build_info", &build_info, "What this module was built with.");
  m.def(
      "isa", [] { return kd::isa_name(kd::isa()); },
      "The instruction set that the CPU kernels use; raises if KDFAST_ISA asks for one that cannot run.");
  m.def(
      "release_memory",
      [] {
        kd::Workspaces::all().release();
        kd::KeptMemory::all().release();
      },
      "Gives back the memory that the CPU kernels keep between calls.");
}
