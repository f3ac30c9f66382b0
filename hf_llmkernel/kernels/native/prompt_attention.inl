// Attention of many tokens at once: included by kernels.inl.
//
// Keys and values of 64 cached tokens at a time are laid out for the products (keys turned, so that 16 tokens are a vector)
// and serve all queries of a tile; sums are kept relative to the largest score so far (Dao et al. 2022, arXiv 2205.14135).

constexpr int64_t kQueryRows = 8;  // a query of one head each

// c[r] = (or +=) a[r] b for R rows and V vectors: depth terms, b [depth, b_stride].
template <int R, int V>
inline void rows_times(const float* const* a, int64_t depth, const float* b, int64_t b_stride, bool adds, float* c, int64_t c_stride) {
    Floats acc[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) acc[r][v] = adds ? f_load(c + r * c_stride + 16 * v) : f_zero();
    for (int64_t k = 0; k < depth; ++k, b += b_stride) {
        Floats terms[V];
        for (int v = 0; v < V; ++v) terms[v] = f_load(b + 16 * v);
        for (int r = 0; r < R; ++r) {
            const Floats factor = f_set(a[r][k]);
            for (int v = 0; v < V; ++v) acc[r][v] = f_fma(factor, terms[v], acc[r][v]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) f_store(c + r * c_stride + 16 * v, acc[r][v]);
}

// The same for kQueryRows rows and any whole number of vectors.
inline void query_rows_times(const float* const* a, int64_t depth, const float* b, int64_t width, bool adds, float* c) {
    for (int64_t r = 0; r < kQueryRows; r += 4) {
        int64_t at = 0;
        for (; at + 16 * kWideVectors <= width; at += 16 * kWideVectors)
            rows_times<4, kWideVectors>(a + r, depth, b + at, width, adds, c + r * width + at, width);
        for (; at < width; at += 16) rows_times<4, 1>(a + r, depth, b + at, width, adds, c + r * width + at, width);
    }
}

// Keys of up to 64 tokens as [head_dim, 64], zero where there is no token.
template <class States>
inline void turn_keys(const PromptAttention& a, int64_t first, int64_t count, float* turned) {
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
template <class States>
inline void widen_values(const PromptAttention& a, int64_t first, int64_t count, int64_t padded, float* widened) {
    for (int64_t t = 0; t < kTokens; ++t)
        for (int64_t d = 0; d < padded; d += 16) {
            const int64_t at = (first + t) * a.token_stride + d;
            f_store(widened + t * padded + d, t < count ? States::load(a.values, at, smaller(16, a.head_dim - d)) : f_zero());
        }
}

// Scores of the tokens first ... first + 63 that the query of token `query` does not see: to -inf.
inline void hide_unseen(const PromptAttention& a, int64_t first, int64_t query, float* scores) {
    const int64_t end = query + 1 - first, begin = a.window > 0 ? query + 1 - a.window - first : 0;
    for (int64_t t = larger(end, 0); t < kTokens; ++t) scores[t] = -INFINITY;
    for (int64_t t = 0; t < smaller(begin, kTokens); ++t) scores[t] = -INFINITY;
    for (int64_t t = 0; a.mask != nullptr && t < smaller(end, kTokens); ++t)
        if (a.mask[first + t] == 0) scores[t] = -INFINITY;
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

template <class States>
inline void attend_tile(const PromptAttention& a) {
    const int64_t padded = round_up(a.head_dim, 16), rows = a.tokens * a.heads, room = round_up(rows, kQueryRows);
    float* keys = a.scratch;
    float* values = keys + a.head_dim * kTokens;
    float* sums = values + kTokens * padded;
    float* largest = sums + room * padded;
    float* totals = largest + room;
    for (int64_t i = 0; i < room * padded; ++i) sums[i] = 0;
    for (int64_t i = 0; i < room; ++i) {
        largest[i] = -INFINITY;
        totals[i] = 0;
    }
    const int64_t end = a.first + a.tokens;
    for (int64_t first = a.window > 0 ? larger(0, a.first + 1 - a.window) : 0; first < end; first += kTokens) {
        const int64_t count = smaller(kTokens, end - first);
        turn_keys<States>(a, first, count, keys);
        widen_values<States>(a, first, count, padded, values);
        for (int64_t row = 0; row < rows; row += kQueryRows) {
            const int64_t low = a.first + row / a.heads, high = a.first + smaller(row + kQueryRows - 1, rows - 1) / a.heads;
            if (first > high || (a.window > 0 && first + count <= low + 1 - a.window)) continue;
            const float* queries[kQueryRows];  // the last one stands in for those that are missing
            for (int64_t r = 0; r < kQueryRows; ++r) {
                const int64_t at = smaller(row + r, rows - 1);
                queries[r] = a.queries + at / a.heads * a.query_stride + at % a.heads * a.head_dim;
            }
            float scores[kQueryRows * kTokens];
            const float* weights[kQueryRows];
            query_rows_times(queries, a.head_dim, keys, kTokens, false, scores);
            const bool all_seen = a.mask == nullptr && first + kTokens <= low + 1 && (a.window == 0 || first > high - a.window);
            for (int64_t r = 0; r < kQueryRows; ++r) {
                weights[r] = scores + r * kTokens;
                if (!all_seen) hide_unseen(a, first, a.first + smaller(row + r, rows - 1) / a.heads, scores + r * kTokens);
                weigh_tokens(scores + r * kTokens, padded, largest + row + r, totals + row + r, sums + (row + r) * padded);
            }
            query_rows_times(weights, kTokens, values, padded, true, sums + row * padded);
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
    if (a.type == LLMK_TYPE_BF16) attend_tile<Bf16States>(a);
    else attend_tile<FloatStates>(a);
}
