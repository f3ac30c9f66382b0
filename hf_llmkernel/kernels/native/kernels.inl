// The kernels, in the vocabulary of sixteen lanes; included once by the file of every instruction set, after its lanes.
//
// All is in an unnamed namespace and nothing of the standard library is used: an inline function compiled here for one
// instruction set must not be what the linker keeps for the others.
#include <cmath>

#include "kernels.h"

namespace {

using namespace llmk;

// ---- activations ----

inline void quantize_segment(const float* x, int64_t columns, int8_t* codes, float* scale, int32_t* sum) {
    const Floats low = columns >= 16 ? f_load(x) : f_load_some(x, columns);
    const Floats high = columns >= 32 ? f_load(x + 16) : columns > 16 ? f_load_some(x + 16, columns - 16) : f_zero();
    const float largest = f_largest(f_max(f_abs(low), f_abs(high)));
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    const Floats first = f_round(f_mul(low, f_set(inverse))), second = f_round(f_mul(high, f_set(inverse)));
    f_store_codes(codes, first);
    f_store_codes(codes + 16, second);
    *scale = largest / 127.0f;
    *sum = static_cast<int32_t>(f_sum(f_add(first, second)));
}

void quantize(const float* x, int64_t columns, int64_t group, int64_t step, int8_t* codes, float* scales, int32_t* sums) {
    if (group == 0) group = columns;
    for (int64_t begin = 0; begin < columns; begin += group) {
        const int64_t end = smaller(begin + group, columns);
        for (int64_t column = begin; column < end; column += kSegment, codes += step * kSegment, scales += step, sums += step)
            quantize_segment(x + column, smaller(kSegment, end - column), codes, scales, sums);
    }
}

void to_bf16(const float* x, int64_t columns, int64_t padded, uint16_t* y) {
    for (int64_t column = 0; column < padded; column += 16) {
        const int64_t count = larger(smaller(16, columns - column), 0), room = smaller(16, padded - column);
        f_store_bf16_some(y + column, count == 16 ? f_load(x + column) : f_load_some(x + column, count), room);
    }
}

void to_floats(const uint16_t* x, int64_t columns, float* y) {
    for (int64_t column = 0; column < columns; column += 16) {
        const int64_t count = smaller(16, columns - column);
        f_store_some(y + column, f_load_bf16_some(x + column, count), count);
    }
}

// ---- integer matrices ----

inline Floats load_scales(const uint8_t* p, int32_t type) {
    switch (type) {
        case LLMK_TYPE_F16: return f_load_half(reinterpret_cast<const uint16_t*>(p));
        case LLMK_TYPE_BF16: return f_load_bf16(reinterpret_cast<const uint16_t*>(p));
        case LLMK_TYPE_U8: return f_load_u8(p);
        default: return f_load(reinterpret_cast<const float*>(p));
    }
}

template <int Lines>
inline void prefetch_lines(const uint8_t* p) {
    for (int i = 0; i < Lines; ++i) prefetch(p + i * kLine);
}

// The codes of a record, 32 columns at a time, each handed to `dot(codes, first of their 4 columns)`.
struct DenseInt8 {
    static constexpr bool kNarrow = false;
    const uint8_t* values;
    DenseInt8() = default;
    DenseInt8(const llmk_matrix&, const uint8_t* v) : values(v) {}
    void group(const uint8_t*) {}
    template <class Dot>
    void segment(Dot&& dot) {
        prefetch_lines<8>(values + kAhead);
        for (int i = 0; i < 8; ++i, values += 64) dot(c_load(values), 4 * i);
    }
};

struct DenseInt4 {
    static constexpr bool kNarrow = true;
    const uint8_t* values;
    DenseInt4() = default;
    DenseInt4(const llmk_matrix&, const uint8_t* v) : values(v) {}
    void group(const uint8_t*) {}
    template <class Dot>
    void segment(Dot&& dot) {
        prefetch_lines<4>(values + kAhead);
        for (int i = 0; i < 4; ++i, values += 64) {
            const Codes pairs = c_load(values);
            dot(c_low(pairs), 8 * i);
            dot(c_high(pairs), 8 * i + 4);
        }
    }
};

#ifdef LLMK_SPARSE_LANES
// The masks of a segment, behind `p`; it moves to the values behind them.
template <class Mask>
struct Masks {
    explicit Masks(const uint8_t*& p) : from(p) { p += kLine; }
    Mask next() {
        Mask mask;
        __builtin_memcpy(&mask, from, sizeof(mask));
        from += sizeof(mask);
        return mask;
    }
    const uint8_t* from;
};

// What is left out counts as the code of zero: the offset, or the row's own zero point.
template <bool Nibbles>
struct Sparse {
    static constexpr bool kNarrow = Nibbles;
    const uint8_t* values;
    Codes fill;
    bool symmetric;
    Sparse() = default;
    Sparse(const llmk_matrix& w, const uint8_t* v)
        : values(v), fill(c_set(Nibbles ? 8 : 128)), symmetric(w.zero_type == LLMK_TYPE_NONE) {}
    void group(const uint8_t* zeros) {
        if (!symmetric) fill = c_of_rows(zeros);
    }
    template <class Dot>
    void segment(Dot&& dot) {
        prefetch_lines<5>(values + kAhead);
        Masks<uint64_t> masks(values);
        for (int i = 0; i < 8; ++i)
            dot(Nibbles ? expand_nibbles(fill, masks.next(), values) : expand_bytes(fill, masks.next(), values), 4 * i);
    }
};
#endif

// One block of 16 rows by M rows of activations from row `m`.
template <class Reader, int M>
inline void integer_block(const llmk_matrix& w, const uint8_t* record, const Inputs& x, int64_t m, Floats* out) {
    const uint8_t* scales = record;
    const uint8_t* zeros = scales + scale_bytes(w);
    Reader reader(w, zeros + zero_bytes(w));
    const int64_t segments = x.padded / kSegment, of_group = group_segments(w);
    const int64_t scale_step = kBlock * type_bytes(w.scale_type), zero_step = kBlock * type_bytes(w.zero_type);
    const bool symmetric = w.zero_type == LLMK_TYPE_NONE;
    const int32_t offset = (Reader::kNarrow ? 0 : kWideOffset) - (symmetric ? (Reader::kNarrow ? 8 : 128) : 0);

    for (int i = 0; i < M; ++i) out[i] = f_zero();
    for (int64_t begin = 0; begin < segments; begin += of_group, scales += scale_step, zeros += zero_step) {
        reader.group(zeros);
        const Floats scale = load_scales(scales, w.scale_type);
        const Floats zero = symmetric ? f_zero() : load_scales(zeros, w.zero_type);
        const int64_t end = smaller(begin + of_group, segments);
        for (int64_t segment = begin; segment < end; ++segment) {
            Ints acc[M];
            const int8_t* codes[M];
            for (int i = 0; i < M; ++i) {
                acc[i] = i_set(offset * x.sums[(m + i) * segments + segment]);
                codes[i] = x.codes + (m + i) * x.padded + segment * kSegment;
            }
            reader.segment([&](Codes weights, int column) {
                for (int i = 0; i < M; ++i) {
                    if (Reader::kNarrow) acc[i] = dot_narrow(acc[i], weights, codes[i] + column);
                    else acc[i] = dot_wide(acc[i], weights, codes[i] + column);
                }
            });
            for (int i = 0; i < M; ++i) {
                const int64_t at = (m + i) * segments + segment;
                Floats product = f_of(acc[i]);
                if (!symmetric) product = f_fnma(zero, f_set(static_cast<float>(x.sums[at])), product);
                out[i] = f_fma(f_mul(product, f_set(x.scales[at])), scale, out[i]);
            }
        }
    }
}

// ---- floating matrices ----

// W rows of the matrix at once, so that an input is loaded once for all of them.
template <int M, int W>
inline void bf16_rows(const uint16_t* weight, int64_t columns, const Inputs& x, int64_t m, int64_t row, Floats (*acc)[16]) {
    const int64_t whole = columns / 32 * 32, rest = columns - whole;
    const uint16_t* inputs = x.bf16 + m * x.padded;
    Floats sum[M][W];
    for (int i = 0; i < M; ++i)
        for (int r = 0; r < W; ++r) sum[i][r] = f_zero();
    for (int64_t column = 0; column < whole; column += 32) {
        for (int r = 0; r < W; ++r) prefetch(weight + r * columns + column + 1024);
        for (int i = 0; i < M; ++i)
            for (int r = 0; r < W; ++r)
                sum[i][r] = dot_bf16(sum[i][r], weight + r * columns + column, inputs + i * x.padded + column);
    }
    for (int i = 0; i < M; ++i)
        for (int r = 0; r < W; ++r) {
            if (rest) sum[i][r] = dot_bf16_some(sum[i][r], weight + r * columns + whole, inputs + i * x.padded + whole, rest);
            acc[i][row + r] = sum[i][r];
        }
}

template <int M>
inline void bf16_block(const llmk_matrix& w, int64_t row, int64_t rows, const Inputs& x, int64_t m, Floats* out) {
    constexpr int W = M < 4 || kFewSums < M ? 1 : kFewSums / M;  // the inputs of few stay in the first-level cache anyway
    const auto* weight = reinterpret_cast<const uint16_t*>(w.data) + row * w.columns;
    Floats acc[M][16];
    for (int i = 0; i < M; ++i)
        for (int r = 0; r < 16; ++r) acc[i][r] = f_zero();
    int64_t r = 0;
    for (; r + W <= rows; r += W) bf16_rows<M, W>(weight + r * w.columns, w.columns, x, m, r, acc);
    for (; r < rows; ++r) bf16_rows<M, 1>(weight + r * w.columns, w.columns, x, m, r, acc);
    for (int i = 0; i < M; ++i) out[i] = f_sums(acc[i]);
}

template <int M>
inline void float_block(const llmk_matrix& w, int64_t row, int64_t rows, const Inputs& x, int64_t m, Floats* out) {
    const auto* weight = reinterpret_cast<const float*>(w.data) + row * w.columns;
    const int64_t whole = w.columns / 16 * 16, rest = w.columns - whole;
    Floats acc[M][16];
    for (int i = 0; i < M; ++i)
        for (int r = 0; r < 16; ++r) acc[i][r] = f_zero();
    for (int64_t r = 0; r < rows; ++r, weight += w.columns) {
        for (int i = 0; i < M; ++i) {
            const float* input = x.floats + (m + i) * x.float_stride;
            Floats sum = f_zero();
            for (int64_t column = 0; column < whole; column += 16)
                sum = f_fma(f_load(weight + column), f_load(input + column), sum);
            if (rest) sum = f_fma(f_load_some(weight + whole, rest), f_load_some(input + whole, rest), sum);
            acc[i][r] = sum;
        }
    }
    for (int i = 0; i < M; ++i) out[i] = f_sums(acc[i]);
}

#ifdef LLMK_SPARSE_LANES
template <int M>
inline void sparse_bf16_block(const uint8_t* values, const Inputs& x, int64_t m, Floats* out) {
    constexpr int P = M == 1 ? 4 : M == 2 ? 2 : 1;  // sums of a row, so that none waits for the one before
    Floats sums[M][P];
    for (int i = 0; i < M; ++i)
        for (int p = 0; p < P; ++p) sums[i][p] = f_zero();
    for (int64_t column = 0; column < x.padded; column += kSegment) {
        prefetch_lines<9>(values + kAhead);
        Masks<uint32_t> masks(values);
        for (int pair = 0; pair < 16; ++pair) {
            const Floats pairs = expand_pairs(masks.next(), values);
            for (int i = 0; i < M; ++i)
                sums[i][pair % P] = dot_pair(sums[i][pair % P], pairs, x.bf16 + (m + i) * x.padded + column + 2 * pair);
        }
    }
    for (int i = 0; i < M; ++i) {
        out[i] = sums[i][0];
        for (int p = 1; p < P; ++p) out[i] = f_add(out[i], sums[i][p]);
    }
}
#endif

// ---- matrix products ----

template <int M>
inline void block_product(const llmk_matrix& w, int64_t block, const Inputs& x, int64_t m, Floats* out) {
    const int64_t row = block * kBlock, rows = smaller(kBlock, w.rows - row);
    switch (w.kind) {
        case LLMK_F32: return float_block<M>(w, row, rows, x, m, out);
        case LLMK_BF16: return bf16_block<M>(w, row, rows, x, m, out);
        case LLMK_INT8: return integer_block<DenseInt8, M>(w, record(w, block), x, m, out);
        case LLMK_INT4: return integer_block<DenseInt4, M>(w, record(w, block), x, m, out);
#ifdef LLMK_SPARSE_LANES
        case LLMK_SPARSE_INT8: return integer_block<Sparse<false>, M>(w, record(w, block), x, m, out);
        case LLMK_SPARSE_INT4: return integer_block<Sparse<true>, M>(w, record(w, block), x, m, out);
        case LLMK_SPARSE_BF16: return sparse_bf16_block<M>(record(w, block), x, m, out);
#endif
        default: __builtin_trap();
    }
}

template <int M>
inline void tile(const llmk_matrix& w, int64_t block, const Inputs& x, int64_t m, float* out, int64_t stride) {
    Floats sums[M];
    block_product<M>(w, block, x, m, sums);
    const int64_t rows = smaller(kBlock, w.rows - block * kBlock);
    for (int i = 0; i < M; ++i) {
        if (rows == kBlock) f_store(out + (m + i) * stride, sums[i]);
        else f_store_some(out + (m + i) * stride, sums[i], rows);
    }
}

void multiply(const llmk_matrix& w, const Inputs& x, int64_t first_block, int64_t end_block, float* out, int64_t stride) {
    fetch_start(w, first_block);
    for (int64_t block = first_block; block < end_block; ++block, out += kBlock) {
        int64_t m = 0;
        for (; x.rows - m >= 8; m += 8) tile<8>(w, block, x, m, out, stride);
        if (x.rows - m >= 4) {
            tile<4>(w, block, x, m, out, stride);
            m += 4;
        }
        if (x.rows - m >= 2) {
            tile<2>(w, block, x, m, out, stride);
            m += 2;
        }
        if (x.rows - m >= 1) tile<1>(w, block, x, m, out, stride);
    }
}

#include "gemm.inl"

// ---- between the products ----

void rms_norm(const float* x, const float* weight, float epsilon, int64_t columns, float* y) {
    Floats squares = f_zero();
    for (int64_t i = 0; i < columns; i += 16) {
        const Floats some = f_load_some(x + i, smaller(16, columns - i));
        squares = f_fma(some, some, squares);
    }
    const Floats inverse = f_set(1.0f / sqrtf(f_sum(squares) / static_cast<float>(columns) + epsilon));
    for (int64_t i = 0; i < columns; i += 16) {
        const int64_t count = smaller(16, columns - i);
        f_store_some(y + i, f_mul(f_mul(f_load_some(x + i, count), inverse), f_load_some(weight + i, count)), count);
    }
}

void add(const float* x, const float* bias, int64_t columns, float* y) {
    for (int64_t i = 0; i < columns; i += 16) {
        const int64_t count = smaller(16, columns - i);
        Floats sum = f_add(f_load_some(y + i, count), f_load_some(x + i, count));
        if (bias != nullptr) sum = f_add(sum, f_load_some(bias + i, count));
        f_store_some(y + i, sum, count);
    }
}

// exp by 2^n and a polynomial of the rest, relative error 2e-7 (coefficients of Cephes' expf).
inline Floats f_exp(Floats x) {
    x = f_min(f_max(x, f_set(-87.0f)), f_set(88.0f));
    const Floats power = f_round(f_mul(x, f_set(1.44269504f)));
    const Floats rest = f_fnma(power, f_set(-2.12194440e-4f), f_fnma(power, f_set(0.693359375f), x));
    Floats y = f_fma(f_set(1.9875691500e-4f), rest, f_set(1.3981999507e-3f));
    y = f_fma(y, rest, f_set(8.3334519073e-3f));
    y = f_fma(y, rest, f_set(4.1665795894e-2f));
    y = f_fma(y, rest, f_set(1.6666665459e-1f));
    y = f_fma(y, rest, f_set(5.0000001201e-1f));
    y = f_add(f_fma(y, f_mul(rest, rest), rest), f_set(1.0f));
    return f_scale_by_power(y, power);
}

inline Floats f_sigmoid(Floats x) { return f_div(f_set(1.0f), f_add(f_set(1.0f), f_exp(f_sub(f_zero(), x)))); }

inline Floats activation_of(int32_t activation, Floats x) {
    if (activation == LLMK_SILU) return f_mul(x, f_sigmoid(x));
    if (activation == LLMK_RELU) return f_max(x, f_zero());
    if (activation == LLMK_GELU_TANH) {  // x (1 + tanh z) / 2 is x sigmoid(2 z)
        const Floats cubic = f_fma(f_mul(f_mul(x, x), x), f_set(0.044715f), x);
        return f_mul(x, f_sigmoid(f_mul(cubic, f_set(1.5957691216f))));
    }
    float lanes[16];
    f_store(lanes, x);
    for (float& lane : lanes) lane = 0.5f * lane * (1.0f + erff(lane * 0.70710678f));
    return f_load(lanes);
}

void activate(int32_t activation, const float* gate, const float* up, int64_t columns, float* y) {
    for (int64_t i = 0; i < columns; i += 16) {
        const int64_t count = smaller(16, columns - i);
        Floats product = activation_of(activation, f_load_some(gate + i, count));
        if (up != nullptr) product = f_mul(product, f_load_some(up + i, count));
        f_store_some(y + i, product, count);
    }
}

// ---- attention ----

struct FloatStates {
    static constexpr bool kScaled = false;
    static constexpr int64_t kBytes = 4;
    static int64_t channel(int64_t d) { return d; }
    static Floats load(const uint8_t* p, int64_t at, int64_t count) {
        const float* states = reinterpret_cast<const float*>(p) + at;
        return count == 16 ? f_load(states) : f_load_some(states, count);
    }
};
struct Bf16States {
    static constexpr bool kScaled = false;
    static constexpr int64_t kBytes = 2;
    static int64_t channel(int64_t d) { return d; }
    static Floats load(const uint8_t* p, int64_t at, int64_t count) {
        const uint16_t* states = reinterpret_cast<const uint16_t*>(p) + at;
        return count == 16 ? f_load_bf16(states) : f_load_bf16_some(states, count);
    }
};
// Codes, without their scales.
template <int Bits>
struct IntegerStates {
    static constexpr bool kScaled = true;
    static constexpr int64_t kBytes = 1;  // of what strides count
    static int64_t channel(int64_t d) { return d * Bits / 8; }
    static Floats load(const uint8_t* p, int64_t at, int64_t count) {
        uint8_t some[16] = {};
        p += at;
        if (count < 16) p = static_cast<const uint8_t*>(__builtin_memcpy(some, p, static_cast<size_t>(channel(count))));
        return Bits == 8 ? f_load_u8(p) : f_load_nibbles(p);
    }
};

// scores[h][t] of up to 16 tokens from `first`; the last one stands in for those that are missing, so that the loops are
// of a fixed length and all sums stay in registers.
template <class States>
inline void score_tokens(const Attention& a, int64_t first, int64_t count, int64_t heads, int64_t head, float (*scores)[kTokens],
                         int64_t column) {
    int64_t at[16];
    for (int64_t t = 0; t < 16; ++t) at[t] = (first + smaller(t, count - 1)) * a.token_stride;
    for (int64_t h = head; h < head + heads; ++h) {
        const float* query = a.queries + h * a.stride;
        Floats sums[16];
        for (int t = 0; t < 16; ++t) sums[t] = f_zero();
        int64_t d = 0;
        for (; d + 16 <= a.head_dim; d += 16) {
            const Floats part = f_load(query + d);
            for (int t = 0; t < 16; ++t) sums[t] = f_fma(part, States::load(a.keys, at[t] + States::channel(d), 16), sums[t]);
        }
        if (const int64_t rest = a.head_dim - d) {
            const Floats part = f_load_some(query + d, rest);
            for (int t = 0; t < 16; ++t) sums[t] = f_fma(part, States::load(a.keys, at[t] + States::channel(d), rest), sums[t]);
        }
        f_store(scores[h - head] + column, f_sums(sums));
    }
}

#ifdef LLMK_SPARSE_LANES
// The same of bf16 keys, whose rounding the query takes part in, as it does in prompts and in torch.
template <>
inline void score_tokens<Bf16States>(const Attention& a, int64_t first, int64_t count, int64_t heads, int64_t head,
                                     float (*scores)[kTokens], int64_t column) {
    const uint16_t* keys[16];
    for (int64_t t = 0; t < 16; ++t)
        keys[t] = reinterpret_cast<const uint16_t*>(a.keys) + (first + smaller(t, count - 1)) * a.token_stride;
    for (int64_t h = head; h < head + heads; ++h) {
        const float* query = a.queries + h * a.stride;
        Floats sums[16];
        for (int t = 0; t < 16; ++t) sums[t] = f_zero();
        int64_t d = 0;
        for (; d + 32 <= a.head_dim; d += 32) {
            const Floats part = f_words(f_load(query + d), f_load(query + d + 16));
            for (int t = 0; t < 16; ++t) sums[t] = dot_words(sums[t], f_load_words(keys[t] + d, 32), part);
        }
        if (const int64_t rest = a.head_dim - d) {
            const Floats high = rest > 16 ? f_load_some(query + d + 16, rest - 16) : f_zero();
            const Floats part = f_words(f_load_some(query + d, smaller(16, rest)), high);
            for (int t = 0; t < 16; ++t) sums[t] = dot_words(sums[t], f_load_words(keys[t] + d, rest), part);
        }
        f_store(scores[h - head] + column, f_sums(sums));
    }
}
#endif

// The states of a tile's tokens, asked for while the tile before it is worked on.
template <class States>
inline void fetch_tokens(const Attention& a, const uint8_t* states, int64_t first, int64_t count) {
    for (int64_t t = first; t < smaller(first + count, a.tokens); ++t)
        for (int64_t at = 0; at < a.token_bytes; at += kLine) prefetch(states + t * a.token_stride * States::kBytes + at);
}

// output[h] += Σ weights[h][t] value[t] in V times 16 channels from d (of the last, `width`), for H heads at once so that
// a value is read once for all.
template <class States, int H, int V>
inline void add_channels(const Attention& a, int64_t first, int64_t count, int64_t head, const float (*weights)[kTokens],
                         int64_t d, int64_t width) {
    Floats sums[H][V];
    for (int h = 0; h < H; ++h)
        for (int v = 0; v < V; ++v) sums[h][v] = f_load_some(a.output + (head + h) * a.stride + d + 16 * v, width);
    for (int64_t t = 0; t < count; ++t) {
        const int64_t at = (first + t) * a.token_stride + States::channel(d);
        if (d == 0) fetch_tokens<States>(a, a.values, first + t + kTokens, 1);
        for (int v = 0; v < V; ++v) {
            const Floats value = States::load(a.values, at + States::channel(16 * v), width);
            for (int h = 0; h < H; ++h) sums[h][v] = f_fma(f_set(weights[h][t]), value, sums[h][v]);
        }
    }
    for (int h = 0; h < H; ++h)
        for (int v = 0; v < V; ++v) f_store_some(a.output + (head + h) * a.stride + d + 16 * v, sums[h][v], width);
}

template <class States, int H>
inline void add_values(const Attention& a, int64_t first, int64_t count, int64_t head, const float (*weights)[kTokens]) {
    int64_t d = 0;
    for (; d + 64 <= a.head_dim; d += 64) add_channels<States, H, 4>(a, first, count, head, weights, d, 16);
    for (; d < a.head_dim; d += 16) add_channels<States, H, 1>(a, first, count, head, weights, d, smaller(16, a.head_dim - d));
}

// Scores to weights exp(score - largest), the largest so far; what was summed before is scaled to it.
inline void weigh(const Attention& a, int64_t first, int64_t count, int64_t head, float* scores) {
    for (int64_t t = 0; a.mask != nullptr && t < count; ++t)
        if (a.mask[first + t] == 0) scores[t] = -INFINITY;
    for (int64_t t = count; t % 16 != 0; ++t) scores[t] = scores[count - 1];
    Floats most = f_load(scores);
    for (int64_t t = 16; t < count; t += 16) most = f_max(most, f_load(scores + t));
    const float tile_largest = f_largest(most);
    const float before = a.largest[head], largest = tile_largest > before ? tile_largest : before;
    if (largest == -INFINITY) {
        for (int64_t t = 0; t < count; ++t) scores[t] = 0;
        return;
    }
    Floats total = f_zero();
    for (int64_t t = 0; t < count; t += 16) {
        const int64_t lanes = smaller(16, count - t);
        const Floats weights = f_exp(f_sub(f_load_some(scores + t, lanes), f_set(largest)));
        f_store_some(scores + t, weights, lanes);
    }
    for (int64_t t = 0; t < count; t += 16) {
        for (int64_t i = t; a.mask != nullptr && i < smaller(t + 16, count); ++i)
            if (a.mask[first + i] == 0) scores[i] = 0;
        total = f_add(total, f_load_some(scores + t, smaller(16, count - t)));
    }
    const float scale = before == -INFINITY ? 0.0f : expf(before - largest);
    a.largest[head] = largest;
    a.total[head] = a.total[head] * scale + f_sum(total);
    float* output = a.output + head * a.stride;
    for (int64_t d = 0; scale != 1.0f && d < a.head_dim; ++d) output[d] *= scale;
}

template <class States, int H>
inline void attend_heads(const Attention& a, int64_t head) {
    float scores[H][kTokens];
    for (int64_t first = 0; first < a.tokens; first += kTokens) {
        const int64_t count = smaller(kTokens, a.tokens - first);
        for (int64_t t = 0; t < count; t += 16) {
            fetch_tokens<States>(a, a.keys, first + kTokens + t, 16);
            score_tokens<States>(a, first + t, smaller(16, count - t), H, head, scores, t);
        }
        for (int h = 0; h < H; ++h) weigh(a, first, count, head + h, scores[h]);
        add_values<States, H>(a, first, count, head, scores);
    }
}

#include "integer_states.inl"

template <class States, int H>
inline void attend_some(const Attention& a, int64_t head) {
    if (States::kScaled) attend_records<States, H>(a, head);
    else attend_heads<States, H>(a, head);
}

template <class States>
inline void attend_all(const Attention& a) {
    int64_t head = 0;
    for (; a.heads - head >= 4; head += 4) attend_some<States, 4>(a, head);
    if (a.heads - head == 3) attend_some<States, 3>(a, head);
    else if (a.heads - head == 2) attend_some<States, 2>(a, head);
    else if (a.heads - head == 1) attend_some<States, 1>(a, head);
}

void attend(const Attention& a) {
    for (int64_t h = 0; h < a.heads; ++h) {
        a.largest[h] = -INFINITY;
        a.total[h] = 0;
    }
    for (int64_t i = 0; i < a.heads * a.stride; ++i) a.output[i] = 0;
    if (a.rounding.bits == 8) attend_all<IntegerStates<8>>(a);
    else if (a.rounding.bits == 4) attend_all<IntegerStates<4>>(a);
    else if (a.type == LLMK_TYPE_BF16) attend_all<Bf16States>(a);
    else attend_all<FloatStates>(a);
}

#include "prompt_attention.inl"

}  // namespace
