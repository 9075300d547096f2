// What siglip2._host offers to Python.

#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>

namespace py = pybind11;

namespace siglip2::host {

// Cuts uint8 arrays (H, W, 3) into `out` (T, P*P*3) with the interpreter's lock released; returns
// grid_hw (B, 2) and cu_seqlens (B+1,).
std::pair<py::array_t<int32_t>, py::array_t<int32_t>> pack_patches(
    const py::sequence& images, py::ssize_t patch_size, int threads,
    py::array_t<uint8_t, py::array::c_style> out);

// The memory of a picture, four bytes a pixel, as an array (height, width, 4) that keeps it alive.
// `capsule` is the second of what the picture's __arrow_c_array__() gives.
py::array_t<uint8_t> arrow_pixels(const py::capsule& capsule, py::ssize_t height,
                                  py::ssize_t width);

}  // namespace siglip2::host
