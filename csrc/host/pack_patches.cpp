// Images of any size cut into patches and written, one after the other, into one packed buffer.
//
// Patch (i, y, x) of image i holds its pixels as (py, px, channel), channel fastest; patches are
// row-major.  Images may have any strides: torch's uint8 resize gives channels-last or planar ones.

#include "host.h"

#include <cstdint>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace siglip2::host {
namespace {

constexpr py::ssize_t kChannels = 3;

struct Image {
  const uint8_t* pixels;
  py::ssize_t stride_y, stride_x, stride_c;  // bytes
  py::ssize_t grid_h, grid_w;                // patches down, across
  py::ssize_t first_patch;                   // row of its first patch in the packed buffer
};

struct Band {  // one row of patches: what threads share out
  py::ssize_t image, y;
};

// BYTES > 0 is a row of a patch known to the compiler, which then copies through registers.
template <int BYTES>
void copy_rows(const Image& image, const uint8_t* band, py::ssize_t patch_size, uint8_t* out) {
  const py::ssize_t row_bytes = BYTES > 0 ? BYTES : patch_size * kChannels;
  for (py::ssize_t x = 0; x < image.grid_w; ++x) {
    const uint8_t* row = band + x * row_bytes;
    for (py::ssize_t py_ = 0; py_ < patch_size; ++py_, row += image.stride_y, out += row_bytes)
      std::memcpy(out, row, row_bytes);
  }
}

// PACKED: the channels of a pixel lie side by side, as they do in Pillow's four bytes a pixel.
template <bool PACKED>
void gather_pixels(const Image& image, const uint8_t* band, py::ssize_t patch_size, uint8_t* out) {
  for (py::ssize_t x = 0; x < image.grid_w; ++x)
    for (py::ssize_t py_ = 0; py_ < patch_size; ++py_) {
      const uint8_t* pixel = band + py_ * image.stride_y + x * patch_size * image.stride_x;
      for (py::ssize_t px = 0; px < patch_size; ++px, pixel += image.stride_x, out += kChannels)
        if (PACKED)
          std::memcpy(out, pixel, kChannels);
        else
          for (py::ssize_t c = 0; c < kChannels; ++c) out[c] = pixel[c * image.stride_c];
    }
}

// Channels apart, the pixels of each side by side.
void interleave_planes(const Image& image, const uint8_t* band, py::ssize_t patch_size,
                       uint8_t* out) {
  for (py::ssize_t x = 0; x < image.grid_w; ++x)
    for (py::ssize_t py_ = 0; py_ < patch_size; ++py_) {
      const uint8_t* red = band + py_ * image.stride_y + x * patch_size;
      const uint8_t* green = red + image.stride_c;
      const uint8_t* blue = green + image.stride_c;
      for (py::ssize_t px = 0; px < patch_size; ++px, out += kChannels) {
        out[0] = red[px];
        out[1] = green[px];
        out[2] = blue[px];
      }
    }
}

void pack_band(const Image& image, py::ssize_t y, py::ssize_t patch_size, uint8_t* out) {
  const uint8_t* band = image.pixels + y * patch_size * image.stride_y;
  out += (image.first_patch + y * image.grid_w) * patch_size * patch_size * kChannels;
  if (image.stride_x == 1)
    interleave_planes(image, band, patch_size, out);
  else if (image.stride_c != 1)
    gather_pixels<false>(image, band, patch_size, out);
  else if (image.stride_x != kChannels)
    gather_pixels<true>(image, band, patch_size, out);
  else if (patch_size == 16)
    copy_rows<16 * kChannels>(image, band, patch_size, out);
  else if (patch_size == 14)
    copy_rows<14 * kChannels>(image, band, patch_size, out);
  else
    copy_rows<0>(image, band, patch_size, out);
}

void pack_bands(const std::vector<Image>& images, const std::vector<Band>& bands,
                py::ssize_t patch_size, int threads, uint8_t* out) {
  const size_t count = bands.size();
  const auto share = [&](size_t part) {
    for (size_t i = count * part / threads; i < count * (part + 1) / threads; ++i)
      pack_band(images[bands[i].image], bands[i].y, patch_size, out);
  };
  std::vector<std::thread> helpers;
  helpers.reserve(threads);  // nothing below may throw while threads run
  int started = 1;
  try {
    for (; started < threads; ++started) helpers.emplace_back(share, started);
  } catch (const std::exception&) {
    // No more threads to be had: this one does their part.
  }
  share(0);
  for (int part = started; part < threads; ++part) share(part);
  for (std::thread& helper : helpers) helper.join();
}

std::vector<Image> describe(const std::vector<py::array_t<uint8_t>>& arrays,
                            py::ssize_t patch_size) {
  std::vector<Image> images;
  images.reserve(arrays.size());
  py::ssize_t first_patch = 0;
  for (const auto& array : arrays) {
    if (array.ndim() != 3 || array.shape(2) != kChannels || array.shape(0) % patch_size ||
        array.shape(1) % patch_size)
      throw std::invalid_argument("need images (H, W, 3) with sides divisible by patch_size; image " +
                                  std::to_string(images.size()) + " is not");
    images.push_back({array.data(), array.strides(0), array.strides(1), array.strides(2),
                      array.shape(0) / patch_size, array.shape(1) / patch_size, first_patch});
    first_patch += images.back().grid_h * images.back().grid_w;
  }
  return images;
}

}  // namespace

std::pair<py::array_t<int32_t>, py::array_t<int32_t>> pack_patches(
    const py::sequence& sequence, py::ssize_t patch_size, int threads,
    py::array_t<uint8_t, py::array::c_style> out) {
  if (patch_size < 1 || threads < 1)
    throw std::invalid_argument("need patch_size >= 1 and threads >= 1");
  std::vector<py::array_t<uint8_t>> arrays;
  arrays.reserve(sequence.size());
  for (const auto& item : sequence) {
    if (!py::isinstance<py::array_t<uint8_t>>(item))
      throw std::invalid_argument("need uint8 arrays; image " + std::to_string(arrays.size()) +
                                  " is not one");
    arrays.push_back(py::reinterpret_borrow<py::array_t<uint8_t>>(item));
  }
  const std::vector<Image> images = describe(arrays, patch_size);
  const auto count = static_cast<py::ssize_t>(images.size());

  py::array_t<int32_t> grid_hw({count, py::ssize_t{2}});
  py::array_t<int32_t> cu_seqlens(count + 1);
  auto grids = grid_hw.mutable_unchecked<2>();
  auto ends = cu_seqlens.mutable_unchecked<1>();
  std::vector<Band> bands;
  ends(0) = 0;
  for (py::ssize_t i = 0; i < count; ++i) {
    const Image& image = images[i];
    grids(i, 0) = static_cast<int32_t>(image.grid_h);
    grids(i, 1) = static_cast<int32_t>(image.grid_w);
    ends(i + 1) = static_cast<int32_t>(image.first_patch + image.grid_h * image.grid_w);
    for (py::ssize_t y = 0; y < image.grid_h; ++y) bands.push_back({i, y});
  }

  const py::ssize_t total = count ? ends(count) : 0;
  const py::ssize_t width = patch_size * patch_size * kChannels;
  if (out.ndim() != 2 || out.shape(0) != total || out.shape(1) != width)
    throw std::invalid_argument("need out (" + std::to_string(total) + ", " +
                                std::to_string(width) + ")");
  uint8_t* const packed = out.mutable_data();  // throws if it is read-only
  {
    py::gil_scoped_release released;
    pack_bands(images, bands, patch_size, threads, packed);
  }
  return {grid_hw, cu_seqlens};
}

}  // namespace siglip2::host
