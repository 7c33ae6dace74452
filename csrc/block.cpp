// Memory of big tensors, which fastgpt.ops.buffers hands to PyTorch through Python's buffer protocol.
#include <cstdlib>
#include <memory>
#include <new>

#include "bindings.h"
#include "checks.h"

namespace fastgpt {
namespace {

constexpr size_t kAlignment = 64;

// malloc and not an aligned allocation: glibc's asks for more than it keeps, so the hole that a freed block of it
// leaves is too small for the next block of the same size.
class Block {
 public:
  explicit Block(int64_t size) : size_(size) {
    check_sizes({size}, "Block");
    size_t room = static_cast<size_t>(size) + kAlignment;
    memory_.reset(std::malloc(room));
    if (!memory_) throw std::bad_alloc();
    begin_ = memory_.get();
    std::align(kAlignment, static_cast<size_t>(size), begin_, room);
  }

  pybind11::buffer_info info() const {
    return {begin_, 1, pybind11::format_descriptor<uint8_t>::format(), 1, {size_}, {1}};
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  int64_t size_;
  std::unique_ptr<void, Free> memory_;
  void* begin_;
};

}  // namespace

void bind_block(pybind11::module_& module) {
  pybind11::class_<Block>(module, "Block", pybind11::buffer_protocol(), "Uninitialised bytes, aligned to 64.")
      .def(pybind11::init<int64_t>())
      .def_buffer(&Block::info);
}

}  // namespace fastgpt
