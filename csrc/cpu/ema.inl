// SPDX-License-Identifier: Apache-2.0
// The leaves of ema.cpp. Included once for each instruction set by multiversion.inl, after leaf.inl.

constexpr i64 kWords = 512;  // random words made at a time

// Words 4 * block to 4 * block + kWords - 1 of `stream`, as philox.h has them. No carry leaves the low half of the
// counter, for what a call makes starts at a multiple of kWords.
#if defined(__SSE2__) && defined(__GNUC__)
// Many counters side by side, each word in the low half of a 64-bit lane: what is above it does no harm to mul_epu32.
#if SSLKERNELS_LEVEL == 2
#define SSLKERNELS_WIDE(name, ...) _mm512_maskz_##name(0xff, __VA_ARGS__)  // without a mask, GCC 12 warns of its header
using Register = __m512i;
#elif SSLKERNELS_LEVEL == 1
#define SSLKERNELS_WIDE(name, ...) _mm256_##name(__VA_ARGS__)
using Register = __m256i;
#else
#define SSLKERNELS_WIDE(name, ...) _mm_##name(__VA_ARGS__)
using Register = __m128i;
#endif
typedef uint64_t Lanes __attribute__((vector_size(sizeof(Register))));

LEAF void philox_words(uint64_t seed, uint64_t stream, uint64_t block, uint32_t* out) {
  constexpr int width = sizeof(Lanes) / 8;
  Lanes counter, key0[10], key1[10];
  // unpacking even and odd lanes puts them in order
  for (int i = 0; i < width; ++i) counter[i] = (block & 0xffffffffu) + static_cast<uint64_t>(i / 2 + i % 2 * width / 2);
  for (uint32_t round = 0; round < 10; ++round) {
    key0[round] = Lanes{} + static_cast<uint32_t>(static_cast<uint32_t>(seed) + round * 0x9E3779B9);
    key1[round] = Lanes{} + static_cast<uint32_t>(static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85);
  }
  const Lanes even_factor = Lanes{} + 0xD2511F53u, odd_factor = Lanes{} + 0xCD9E8D57u;
  for (i64 i = 0; i < kWords; i += 4 * width, counter += width) {
    Lanes c0 = counter, c1 = Lanes{} + (block >> 32), c2 = Lanes{} + stream, c3 = c2 >> 32;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const Lanes even = reinterpret_cast<Lanes>(
          SSLKERNELS_WIDE(mul_epu32, reinterpret_cast<Register>(c0), reinterpret_cast<Register>(even_factor)));
      const Lanes odd = reinterpret_cast<Lanes>(
          SSLKERNELS_WIDE(mul_epu32, reinterpret_cast<Register>(c2), reinterpret_cast<Register>(odd_factor)));
      c0 = (odd >> 32) ^ c1 ^ key0[round];
      c2 = (even >> 32) ^ c3 ^ key1[round];
      c1 = odd;
      c3 = even;
    }
    const auto first = reinterpret_cast<Register>((c0 & 0xffffffffu) | c1 << 32);
    const auto second = reinterpret_cast<Register>((c2 & 0xffffffffu) | c3 << 32);
    const Register low = SSLKERNELS_WIDE(unpacklo_epi64, first, second);
    const Register high = SSLKERNELS_WIDE(unpackhi_epi64, first, second);
    __builtin_memcpy(out + i, &low, sizeof(low));
    __builtin_memcpy(out + i + 2 * width, &high, sizeof(high));
  }
}
#undef SSLKERNELS_WIDE
#else
LEAF void philox_words(uint64_t seed, uint64_t stream, uint64_t block, uint32_t* out) {
  for (i64 i = 0; i < kWords / 4; ++i) {
    const Philox four = philox(seed, stream, block + static_cast<uint64_t>(i));
    __builtin_memcpy(out + 4 * i, four.words, sizeof(four.words));
  }
}
#endif

INLINE void narrow(float x, uint32_t word, BFloat16* out) { out->x = round_bfloat16(x, word); }
INLINE void narrow(float x, uint32_t word, Half* out) { out->x = round_float16(x, word); }

template <typename T, typename S>
using Wider = std::conditional_t<std::is_same_v<T, double> || std::is_same_v<S, double>, double, float>;

// target + (1 - momentum) (source - target), from the nearer end as torch.lerp does it, so that both ends are exact.
template <typename Real>
INLINE Real between(Real target, Real source, Real momentum, Real weight) {
  const bool near = weight < Real(0.5);
  return (near ? target : source) + (near ? weight : -momentum) * (source - target);
}

template <typename T, typename S>
LEAF void lerp(T* target, const S* source, i64 n, double momentum) {
  using Real = Wider<T, S>;
  const Real m = static_cast<Real>(momentum), weight = static_cast<Real>(1.0 - momentum);
#pragma omp simd
  for (i64 i = 0; i < n; ++i) {
    narrow(between(Real(widen(target[i])), Real(widen(source[i])), m, weight), &target[i]);
  }
}

template <typename T, typename S>
LEAF void lerp_rounded(T* target, const S* source, i64 n, double momentum, const Random& random) {
  using Real = Wider<T, S>;
  const Real m = static_cast<Real>(momentum), weight = static_cast<Real>(1.0 - momentum);
  uint32_t words[kWords];
  for (i64 first = 0; first < n; first += kWords) {
    philox_words(random.seed, random.stream, static_cast<uint64_t>(random.first + first) / 4, words);
    T* t = target + first;
    const S* s = source + first;
    const i64 count = n - first < kWords ? n - first : kWords;
#pragma omp simd
    for (i64 i = 0; i < count; ++i) {
      narrow(static_cast<float>(between(Real(widen(t[i])), Real(widen(s[i])), m, weight)), words[i], &t[i]);
    }
  }
}

template <typename T, typename S>
INLINE void update_as(void* target, const void* source, i64 begin, i64 count, double momentum, const Random* random) {
  T* t = static_cast<T*>(target) + begin;
  const S* s = static_cast<const S*>(source) + begin;
  if constexpr (std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>) {
    if (random)
      return lerp_rounded(t, s, count, momentum, *random);
  }
  lerp(t, s, count, momentum);
}

template <typename T>
INLINE void update_from(void* target, const void* source, Dtype from, i64 begin, i64 count, double momentum,
                        const Random* random) {
  return from == Dtype::kFloat      ? update_as<T, float>(target, source, begin, count, momentum, random)
         : from == Dtype::kDouble   ? update_as<T, double>(target, source, begin, count, momentum, random)
         : from == Dtype::kBFloat16 ? update_as<T, BFloat16>(target, source, begin, count, momentum, random)
                                    : update_as<T, Half>(target, source, begin, count, momentum, random);
}

// Elements [begin, begin + count) of one pair; 16-bit targets are rounded to nearest, or with random words.
LEAF void update(void* target, Dtype to, const void* source, Dtype from, i64 begin, i64 count, double momentum,
                 const Random* random) {
  return to == Dtype::kFloat      ? update_from<float>(target, source, from, begin, count, momentum, random)
         : to == Dtype::kDouble   ? update_from<double>(target, source, from, begin, count, momentum, random)
         : to == Dtype::kBFloat16 ? update_from<BFloat16>(target, source, from, begin, count, momentum, random)
                                  : update_from<Half>(target, source, from, begin, count, momentum, random);
}
