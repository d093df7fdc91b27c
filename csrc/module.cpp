// The Python module ddfast._C. It holds nothing: importing it loads the shared library, whose static initialisers
// (STABLE_TORCH_LIBRARY_FRAGMENT and STABLE_TORCH_LIBRARY_IMPL, one pair in each file beside this one) register the
// operators of the namespace `ddfast_native`.

#include <Python.h>

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", "Registers the operators torch.ops.ddfast_native.", -1,
      nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
