// cpu_body: the number of the body that this process runs, as cpu_body.h orders them.

#include "cpu_body.h"

#include <torch/csrc/stable/library.h>

namespace {

int64_t cpu_body() { return static_cast<int64_t>(ddfast::cpu_body()); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ddfast_native, library) { library.def("cpu_body() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(ddfast_native, CompositeExplicitAutograd, library) {
  library.impl("cpu_body", TORCH_BOX(&cpu_body));
}
