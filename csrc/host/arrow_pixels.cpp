// Pillow's pixels without a copy, through Arrow's C data interface.

#include "host.h"

#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace siglip2::host {
namespace {

constexpr py::ssize_t kPixelBytes = 4;  // Pillow keeps RGB so: three channels and one of padding

// arrow.apache.org/docs/format/CDataInterface.html
struct ArrowArray {
  int64_t length, null_count, offset, n_buffers, n_children;
  const void** buffers;
  ArrowArray** children;
  ArrowArray* dictionary;
  void (*release)(ArrowArray*);
  void* private_data;
};

// A list of fixed size a pixel, over one child of bytes; null if it is anything else.
const uint8_t* pixel_bytes(const ArrowArray& list, int64_t pixels) {
  if (list.release == nullptr || list.length != pixels || list.offset != 0 || list.n_children != 1)
    return nullptr;
  const ArrowArray& bytes = *list.children[0];
  if (bytes.length != pixels * kPixelBytes || bytes.offset != 0 || bytes.n_buffers != 2)
    return nullptr;
  return static_cast<const uint8_t*>(bytes.buffers[1]);
}

}  // namespace

py::array_t<uint8_t> arrow_pixels(const py::capsule& capsule, py::ssize_t height,
                                  py::ssize_t width) {
  if (capsule.name() == nullptr || std::strcmp(capsule.name(), "arrow_array") != 0)
    throw std::invalid_argument("need a capsule called arrow_array");
  const auto& list = *capsule.get_pointer<ArrowArray>();
  const uint8_t* pixels = pixel_bytes(list, int64_t{height} * width);
  if (pixels == nullptr)
    throw std::invalid_argument("need one list of four bytes for each of height x width pixels");
  return py::array_t<uint8_t>({height, width, kPixelBytes}, pixels, capsule);
}

}  // namespace siglip2::host
