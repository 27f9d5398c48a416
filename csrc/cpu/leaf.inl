// SPDX-License-Identifier: Apache-2.0
// What every leaf function may use: included once for each instruction set by multiversion.inl; no include of its own.
// A LEAF is a loop that the compiler vectorises, not inlined into code of another instruction set; its helpers are
// INLINE.

#define LEAF static __attribute__((noinline))
#define INLINE static inline __attribute__((always_inline))

template <typename To, typename From>
INLINE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "");
  To y;
  __builtin_memcpy(&y, &x, sizeof(y));
  return y;
}

INLINE float widen(float x) { return x; }
INLINE double widen(double x) { return x; }
INLINE float widen(uint8_t x) { return x; }

struct BFloat16 {
  uint16_t x;
};
struct Half {
  uint16_t x;
};

INLINE float widen(BFloat16 h) { return bits<float>(uint32_t(h.x) << 16); }

// Integer form of half to float: it vectorises without F16C. The product rescales the exponent, denormals included.
INLINE float widen(Half h) {
  const uint32_t magnitude = uint32_t(h.x & 0x7fff) << 13;
  const float value = bits<float>(magnitude) * bits<float>(uint32_t(254 - 15) << 23);
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return bits<float>(bits<uint32_t>(value) | special | (uint32_t(h.x & 0x8000) << 16));
}

// To nearest, ties to even. NaN stays NaN: the sum would carry into the sign.
INLINE void narrow(float x, BFloat16* out) {
  const uint32_t u = bits<uint32_t>(x), rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  out->x = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded);
}

// To nearest, ties to even. Adding 0.5 shifts and rounds the mantissa of what becomes a denormal.
INLINE void narrow(float x, Half* out) {
  const uint32_t u = bits<uint32_t>(x), magnitude = u & 0x7fffffffu, sign = (u >> 16) & 0x8000u;
  const uint32_t small = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t value = magnitude >= 0x47800000u ? special : magnitude < 0x38800000u ? small : normal;
  out->x = static_cast<uint16_t>(value | sign);
}

INLINE void narrow(float x, float* out) { *out = x; }
INLINE void narrow(float x, double* out) { *out = x; }
INLINE void narrow(double x, double* out) { *out = x; }
template <typename S>
INLINE void narrow(double x, S* out) {
  narrow(static_cast<float>(x), out);  // as torch rounds float64 to 16 bits
}

// exp(x), zero below about exp(-70) (double: exp(-690)): far under the rounding of any sum it enters, and it keeps
// denormals, on which multiplications stall, out of the matrix products. ln 2 comes in two parts, so that the reduced
// argument keeps its last bits. Relative error below 2e-7 (double: 4e-16).
INLINE float exp_(float x) {
  const float y = x * 1.44269504f;
  const float t = y + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are round(y)
  const float n = t - 12582912.0f;
  const float r = (x - n * 6.93359375e-01f) + n * 2.12194440e-04f;
  float p = 1.383683574e-3f;
  p = p * r + 8.374824031e-3f;
  p = p * r + 4.166822619e-2f;
  p = p * r + 1.666642007e-1f;
  p = p * r + 4.999999208e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const float e = p * bits<float>((bits<uint32_t>(t) - 0x4B400000u + 127u) << 23);
  return y < -101.0f ? 0.0f : e;
}

INLINE double exp_(double x) {
  const double y = x * 1.4426950408889634;
  const double t = y + 6755399441055744.0;  // 1.5 * 2^52
  const double n = t - 6755399441055744.0;
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double p = 2.499430327381439512e-8;
  p = p * r + 2.763230817489448582e-7;
  p = p * r + 2.755762262047198039e-6;
  p = p * r + 2.480148648643140087e-5;
  p = p * r + 1.984126943247048834e-4;
  p = p * r + 1.388888895126104161e-3;
  p = p * r + 8.333333333559433932e-3;
  p = p * r + 4.166666666649262968e-2;
  p = p * r + 1.66666666666661682e-1;
  p = p * r + 5.000000000000017703e-1;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const double e = p * bits<double>((bits<uint64_t>(t) - 0x4338000000000000ull + 1023u) << 52);
  return y < -1000.0 ? 0.0 : e;
}
