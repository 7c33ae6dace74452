#pragma once

#include <cstdint>
#include <cstring>

// bfloat16, rounded to nearest even.
struct __nv_bfloat16 {
  uint16_t bits = 0;

  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    bits = static_cast<uint16_t>(x != x ? 0x7fff : (u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
  explicit operator float() const {
    const uint32_t u = uint32_t{bits} << 16;
    float x;
    std::memcpy(&x, &u, 4);
    return x;
  }
};
