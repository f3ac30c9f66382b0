// Attention of many tokens at once: included by kernels.inl.
//
// Keys and values of 64 cached tokens at a time are laid out for the products (keys turned, so that 16 tokens are a vector)
// and serve all queries of a tile; sums are kept relative to the largest score so far (Dao et al. 2022, arXiv 2205.14135).

constexpr int64_t kQueryRows = 8;  // a query of one head each

// Products of floats, and of pairs of bf16: `kOf` terms a lane.
struct FloatTerms {
    using Value = float;
    static constexpr int kOf = 1;
    static Floats dot(Floats acc, Floats terms, const float* x) { return f_fma(f_set(*x), terms, acc); }
};
struct PairTerms {
    using Value = uint16_t;
    static constexpr int kOf = 2;
    static Floats dot(Floats acc, Floats terms, const uint16_t* x) { return dot_pair(acc, terms, x); }
};

// c[r] = (or +=) a[r] b for R rows and V vectors: depth steps, b [depth, b_stride].
template <class Terms, int R, int V>
inline void rows_times(const typename Terms::Value* const* a, int64_t depth, const float* b, int64_t b_stride, bool adds, float* c,
                       int64_t c_stride) {
    Floats acc[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) acc[r][v] = adds ? f_load(c + r * c_stride + 16 * v) : f_zero();
    for (int64_t k = 0; k < depth; ++k, b += b_stride) {
        Floats terms[V];
        for (int v = 0; v < V; ++v) terms[v] = f_load(b + 16 * v);
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) acc[r][v] = Terms::dot(acc[r][v], terms[v], a[r] + Terms::kOf * k);
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) f_store(c + r * c_stride + 16 * v, acc[r][v]);
}

// The same for kQueryRows rows and any whole number of vectors.
template <class Terms>
inline void query_rows_times(const typename Terms::Value* const* a, int64_t depth, const float* b, int64_t width, bool adds,
                             float* c) {
    for (int64_t r = 0; r < kQueryRows; r += 4) {
        int64_t at = 0;
        for (; at + 16 * kWideVectors <= width; at += 16 * kWideVectors)
            rows_times<Terms, 4, kWideVectors>(a + r, depth, b + at, width, adds, c + r * width + at, width);
        for (; at < width; at += 16) rows_times<Terms, 4, 1>(a + r, depth, b + at, width, adds, c + r * width + at, width);
    }
}

// How a tile's queries, keys, values and weights are laid out for products of floats.
template <class States>
struct FloatTile : FloatTerms {
    static const float* query(const PromptAttention& a, float*, int64_t row) {
        return a.queries + row / a.heads * a.query_stride + row % a.heads * a.head_dim;
    }
    static void lay_out_queries(const PromptAttention&, float*) {}

    // Keys of up to 64 tokens as [head_dim, 64], zero where there is no token.
    static void lay_out_keys(const PromptAttention& a, int64_t first, int64_t count, float* turned) {
        for (int64_t d = 0; d < a.head_dim; d += 16) {
            const int64_t width = smaller(16, a.head_dim - d);
            for (int64_t t = 0; t < kTokens; t += 16) {
                Floats some[16];
                for (int64_t i = 0; i < 16; ++i)
                    some[i] = t + i < count ? States::load(a.keys, (first + t + i) * a.token_stride + d, width) : f_zero();
                f_turn(some);
                for (int64_t i = 0; i < width; ++i) f_store(turned + (d + i) * kTokens + t, some[i]);
            }
        }
    }

    // Values of up to 64 tokens as [64, head_dim padded to 16].
    static void lay_out_values(const PromptAttention& a, int64_t first, int64_t count, int64_t padded, float* widened) {
        for (int64_t t = 0; t < kTokens; ++t)
            for (int64_t d = 0; d < padded; d += 16) {
                const int64_t at = (first + t) * a.token_stride + d, width = smaller(16, a.head_dim - d);
                f_store(widened + t * padded + d, t < count ? States::load(a.values, at, width) : f_zero());
            }
    }

    struct Weights {
        const float* of(const float* scores, int64_t) { return scores; }
    };
};

// The same for products of bf16, whose rounding queries and weights take part in.
struct PairTile : PairTerms {
    static int64_t row_floats(int64_t head_dim) { return round_up(head_dim, 32) / kOf; }
    static const uint16_t* query(const PromptAttention& a, const float* queries, int64_t row) {
        return reinterpret_cast<const uint16_t*>(queries + row * row_floats(a.head_dim));
    }
    static void lay_out_queries(const PromptAttention& a, float* queries) {
        for (int64_t row = 0; row < a.tokens * a.heads; ++row)
            to_bf16(a.queries + row / a.heads * a.query_stride + row % a.heads * a.head_dim, a.head_dim,
                    kOf * row_floats(a.head_dim), const_cast<uint16_t*>(query(a, queries, row)));
    }

    // Keys of up to 64 tokens as [head_dim / 2 pairs, 64].
    static void lay_out_keys(const PromptAttention& a, int64_t first, int64_t count, float* turned) {
        const auto* keys = reinterpret_cast<const uint16_t*>(a.keys);
        for (int64_t d = 0; d < a.head_dim; d += 32) {
            const int64_t width = smaller(32, a.head_dim - d);
            for (int64_t t = 0; t < kTokens; t += 16) {
                Floats some[16];
                for (int64_t i = 0; i < 16; ++i)
                    some[i] = f_load_words(keys + (first + t + i) * a.token_stride + d, t + i < count ? width : 0);
                f_turn(some);
                for (int64_t i = 0; i < ceil_div(width, kOf); ++i) f_store(turned + (d / kOf + i) * kTokens + t, some[i]);
            }
        }
    }

    // Values of up to 64 tokens as [32 pairs of tokens, head_dim padded to 16].
    static void lay_out_values(const PromptAttention& a, int64_t first, int64_t count, int64_t padded, float* paired) {
        const auto* values = reinterpret_cast<const uint16_t*>(a.values) + first * a.token_stride;
        for (int64_t t = 0; t < kTokens; t += kOf)
            for (int64_t d = 0; d < padded; d += 16) {
                const int64_t width = smaller(16, a.head_dim - d);
                const uint16_t* from = values + t * a.token_stride + d;
                f_store(paired + t / kOf * padded + d,
                        f_pair_words(from, t < count ? width : 0, from + a.token_stride, t + 1 < count ? width : 0));
            }
    }

    struct Weights {
        uint16_t words[kQueryRows][kTokens];
        const uint16_t* of(const float* scores, int64_t r) {
            to_bf16(scores, kTokens, kTokens, words[r]);
            return words[r];
        }
    };
};

// What is added to scores: -inf to hide them, on both sides of as many that are seen.
struct HiddenScores {
    alignas(64) float lanes[3 * kTokens];
    constexpr HiddenScores() : lanes() {
        for (int64_t t = 0; t < kTokens; ++t) lanes[t] = lanes[2 * kTokens + t] = -INFINITY;
    }
    const float* before(int64_t begin) const { return lanes + kTokens - smaller(larger(begin, 0), kTokens); }
    const float* from(int64_t end) const { return lanes + 2 * kTokens - smaller(larger(end, 0), kTokens); }
};
constexpr HiddenScores kHidden;

// Scores of the tokens first ... first + 63 that the query of token `query` does not see: to -inf. `masked`: what the mask
// hides, or NULL.
inline void hide_unseen(const PromptAttention& a, int64_t first, int64_t query, const float* masked, float* scores) {
    const float* later = kHidden.from(query + 1 - first);
    const float* earlier = kHidden.before(a.window > 0 ? query + 1 - a.window - first : 0);
    for (int64_t t = 0; t < kTokens; t += 16) {
        Floats hidden = f_add(f_load(later + t), f_load(earlier + t));
        if (masked != nullptr) hidden = f_add(hidden, f_load(masked + t));
        f_store(scores + t, f_add(f_load(scores + t), hidden));
    }
}

// What the mask hides of the tokens first ... first + 63, or NULL where there is none.
inline const float* hidden_by_mask(const PromptAttention& a, int64_t first, int64_t count, float* masked) {
    if (a.mask == nullptr) return nullptr;
    for (int64_t t = 0; t < kTokens; ++t) masked[t] = t < count && a.mask[first + t] == 0 ? -INFINITY : 0.0f;
    return masked;
}

// Scores to weights; what was summed before, to the same scale.
inline void weigh_tokens(float* scores, int64_t padded, float* largest, float* total, float* output) {
    Floats most = f_load(scores);
    for (int64_t t = 16; t < kTokens; t += 16) most = f_max(most, f_load(scores + t));
    const float tile_largest = f_largest(most), before = *largest, now = tile_largest > before ? tile_largest : before;
    if (now == -INFINITY) {
        for (int64_t t = 0; t < kTokens; t += 16) f_store(scores + t, f_zero());
        return;
    }
    Floats sum = f_zero();
    for (int64_t t = 0; t < kTokens; t += 16) {
        const Floats weights = f_exp(f_sub(f_load(scores + t), f_set(now)));
        f_store(scores + t, weights);
        sum = f_add(sum, weights);
    }
    if (now != before) {  // before the first seen token, all sums are zero
        const Floats scale = f_exp(f_set(before - now));
        for (int64_t d = 0; d < padded; d += 16) f_store(output + d, f_mul(f_load(output + d), scale));
        float lanes[16];
        f_store(lanes, scale);
        *total *= lanes[0];
    }
    *largest = now;
    *total += f_sum(sum);
}

template <class Laid>
inline void attend_tile(const PromptAttention& a) {
    const int64_t padded = round_up(a.head_dim, 16), rows = a.tokens * a.heads, room = round_up(rows, kQueryRows);
    float* keys = a.scratch;
    float* values = keys + a.head_dim * kTokens;
    float* sums = values + kTokens * padded;
    float* largest = sums + room * padded;
    float* totals = largest + room;
    float* queries = totals + room;
    for (int64_t i = 0; i < room * padded; ++i) sums[i] = 0;
    for (int64_t i = 0; i < room; ++i) {
        largest[i] = -INFINITY;
        totals[i] = 0;
    }
    Laid::lay_out_queries(a, queries);
    const int64_t end = a.first + a.tokens;
    for (int64_t first = a.window > 0 ? larger(0, a.first + 1 - a.window) : 0; first < end; first += kTokens) {
        const int64_t count = smaller(kTokens, end - first);
        Laid::lay_out_keys(a, first, count, keys);
        Laid::lay_out_values(a, first, count, padded, values);
        float masks[kTokens];
        const float* masked = hidden_by_mask(a, first, count, masks);
        for (int64_t row = 0; row < rows; row += kQueryRows) {
            const auto token = [&](int64_t r) { return a.first + smaller(row + r, rows - 1) / a.heads; };
            const int64_t low = token(0), high = token(kQueryRows - 1);
            if (first > high || (a.window > 0 && first + count <= low + 1 - a.window)) continue;
            const typename Laid::Value *some[kQueryRows], *weights[kQueryRows];
            float scores[kQueryRows * kTokens];
            typename Laid::Weights rounded;
            // The last query stands in for those that are missing.
            for (int64_t r = 0; r < kQueryRows; ++r) some[r] = Laid::query(a, queries, smaller(row + r, rows - 1));
            query_rows_times<Laid>(some, ceil_div(a.head_dim, Laid::kOf), keys, kTokens, false, scores);
            const bool all_seen = a.mask == nullptr && first + kTokens <= low + 1 && (a.window == 0 || first > high - a.window);
            for (int64_t r = 0; r < kQueryRows; ++r) {
                float* of_row = scores + r * kTokens;
                if (!all_seen) hide_unseen(a, first, token(r), masked, of_row);
                weigh_tokens(of_row, padded, largest + row + r, totals + row + r, sums + (row + r) * padded);
                weights[r] = rounded.of(of_row, r);
            }
            query_rows_times<Laid>(weights, kTokens / Laid::kOf, values, padded, true, sums + row * padded);
        }
    }
    for (int64_t row = 0; row < rows; ++row) {
        const Floats share = f_set(totals[row] > 0 ? 1.0f / totals[row] : 0.0f);
        float* output = a.output + row / a.heads * a.output_stride + row % a.heads * a.head_dim;
        for (int64_t d = 0; d < a.head_dim; d += 16)
            f_store_some(output + d, f_mul(f_load(sums + row * padded + d), share), smaller(16, a.head_dim - d));
    }
}

void attend_prompt(const PromptAttention& a) {
    if (a.type != LLMK_TYPE_BF16) attend_tile<FloatTile<FloatStates>>(a);
    else if (kDotsPairs) attend_tile<PairTile>(a);
    else attend_tile<FloatTile<Bf16States>>(a);
}
