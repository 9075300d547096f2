#include "host.h"

PYBIND11_MODULE(_host, module) {
  module.doc() = "Pictures to packed patches, without copies and without the interpreter's lock.";
  // noconvert: a converted copy of `out` would be written and thrown away.
  module.def("pack_patches", &siglip2::host::pack_patches, py::arg("images"),
             py::arg("patch_size"), py::arg("threads"), py::arg("out").noconvert());
  module.def("arrow_pixels", &siglip2::host::arrow_pixels, py::arg("capsule"), py::arg("height"),
             py::arg("width"));
}
