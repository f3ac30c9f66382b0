// Keys and values as integers: included by kernels.inl.
//
// A new token attends to the codes themselves, a prompt to what is restored of them.

inline float load_entry(const uint8_t* p, int64_t index, int32_t type) {
    uint32_t bits = 0;
    if (type == LLMK_TYPE_BF16) {
        uint16_t word;
        __builtin_memcpy(&word, p + 2 * index, 2);
        bits = static_cast<uint32_t>(word) << 16;
    } else {
        __builtin_memcpy(&bits, p + 4 * index, 4);
    }
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}

// Stores a number, and gives it as it is then.
inline float store_entry(uint8_t* p, int64_t index, int32_t type, float x) {
    if (type == LLMK_TYPE_BF16) f_store_bf16_some(reinterpret_cast<uint16_t*>(p) + index, f_set(x), 1);
    else __builtin_memcpy(p + 4 * index, &x, 4);
    return load_entry(p, index, type);
}

void round_head(const Rounding& r, const float* x, uint8_t* record) {
    uint8_t* scales = record + r.code_bytes();
    uint8_t* lows = scales + r.groups() * type_bytes(r.type);
    const float levels = r.bits == 8 ? 255.0f : 15.0f;
    for (int64_t g = 0; g < r.groups(); ++g) {
        const float* values = x + g * r.group;
        float lowest = values[0], highest = values[0];
        for (int64_t i = 1; i < r.group; ++i) {
            lowest = values[i] < lowest ? values[i] : lowest;
            highest = values[i] > highest ? values[i] : highest;
        }
        const float low = store_entry(lows, g, r.type, lowest);
        const float scale = store_entry(scales, g, r.type, (highest - lowest) / levels);
        const float inverse = scale > 0 ? 1 / scale : 0;
        for (int64_t i = 0; i < r.group; ++i) {
            const int64_t at = g * r.group + i;
            float level = nearbyintf((values[i] - low) * inverse);
            level = level > 0 ? level : 0;  // of what is no number too
            const auto code = static_cast<uint8_t>(level < levels ? level : levels);
            if (r.bits == 8) record[at] = code;
            else record[at / 2] = static_cast<uint8_t>(at % 2 ? record[at / 2] | (code << 4) : code);
        }
    }
}

inline void store_states(uint8_t* y, int64_t at, int32_t type, Floats x, int64_t count) {
    if (type == LLMK_TYPE_BF16) f_store_bf16_some(reinterpret_cast<uint16_t*>(y) + at, x, count);
    else f_store_some(reinterpret_cast<float*>(y) + at, x, count);
}

void restore_head(const Rounding& r, const uint8_t* record, uint8_t* y) {
    const uint8_t* scales = record + r.code_bytes();
    const uint8_t* lows = scales + r.groups() * type_bytes(r.type);
    for (int64_t at = 0; at < r.head_dim;) {
        const int64_t g = at / r.group, count = smaller(16, (g + 1) * r.group - at);
        Floats codes;
        if (count == 16 && r.bits == 8) codes = f_load_u8(record + at);
        else if (count == 16 && at % 2 == 0) codes = f_load_nibbles(record + at / 2);
        else {
            float lanes[16] = {};
            for (int64_t i = at; i < at + count; ++i)
                lanes[i - at] = static_cast<float>(r.bits == 8 ? record[i] : (record[i / 2] >> (4 * (i % 2))) & 15);
            codes = f_load(lanes);
        }
        const float scale = load_entry(scales, g, r.type), low = load_entry(lows, g, r.type);
        store_states(y, at, r.type, f_fma(codes, f_set(scale), f_set(low)), count);
        at += count;
    }
}

// Scales and lowest values of one group of a tile's tokens.
struct GroupScales {
    float scales[kTokens], lows[kTokens];

    void read(const Attention& a, const uint8_t* states, int64_t group, int64_t first, int64_t count) {
        const Rounding& r = a.rounding;
        const uint8_t* entries = states + first * a.token_stride + r.code_bytes();
        const int64_t low = r.groups() * type_bytes(r.type);
        for (int64_t t = 0; t < count; ++t, entries += a.token_stride) {
            scales[t] = load_entry(entries, group, r.type);
            lows[t] = load_entry(entries + low, group, r.type);
        }
        for (int64_t t = count; t % 16 != 0; ++t) scales[t] = lows[t] = 0;
    }
};

// A group's channels as heads of their own.
template <class States>
inline Attention channels_of_group(const Attention& a, int64_t group) {
    const int64_t begin = group * a.rounding.group;
    Attention part = a;
    part.head_dim = a.rounding.group;
    part.queries += begin;
    part.output += begin;
    part.keys += States::channel(begin);
    part.values += States::channel(begin);
    if (group > 0) part.token_bytes = 0;  // on their way since the first group
    return part;
}

// Products with codes are made whole by what scales and lowest values add: q · (s c + l) = s (q · c) + l Σ q.
template <class States, int H>
inline void score_records(const Attention& a, int64_t first, int64_t count, int64_t head, float (*scores)[kTokens]) {
    float products[H][kTokens];
    GroupScales keys;
    for (int h = 0; h < H; ++h)
        for (int64_t t = 0; t < kTokens; t += 16) f_store(scores[h] + t, f_zero());
    for (int64_t g = 0; g < a.rounding.groups(); ++g) {
        const Attention part = channels_of_group<States>(a, g);
        keys.read(a, a.keys, g, first, count);
        for (int64_t t = 0; t < count; t += 16) {
            fetch_tokens<States>(part, part.keys, first + kTokens + t, 16);
            score_tokens<States>(part, first + t, smaller(16, count - t), H, head, products, t);
        }
        for (int h = 0; h < H; ++h) {
            Floats sum = f_zero();
            const float* query = part.queries + (head + h) * a.stride;
            for (int64_t d = 0; d < part.head_dim; d += 16) sum = f_add(sum, f_load_some(query + d, smaller(16, part.head_dim - d)));
            const Floats all = f_set(f_sum(sum));
            for (int64_t t = 0; t < count; t += 16) {
                const Floats lows = f_fma(all, f_load(keys.lows + t), f_load(scores[h] + t));
                f_store(scores[h] + t, f_fma(f_load(products[h] + t), f_load(keys.scales + t), lows));
            }
        }
    }
}

template <class States, int H>
inline void add_records(const Attention& a, int64_t first, int64_t count, int64_t head, const float (*weights)[kTokens]) {
    float scaled[H][kTokens];
    GroupScales values;
    for (int64_t g = 0; g < a.rounding.groups(); ++g) {
        const Attention part = channels_of_group<States>(a, g);
        values.read(a, a.values, g, first, count);
        for (int h = 0; h < H; ++h) {
            Floats low = f_zero();
            for (int64_t t = 0; t < count; t += 16) {
                const Floats some = f_load_some(weights[h] + t, smaller(16, count - t));
                low = f_fma(some, f_load(values.lows + t), low);
                f_store(scaled[h] + t, f_mul(some, f_load(values.scales + t)));
            }
            const float sum = f_sum(low);
            float* output = part.output + (head + h) * a.stride;
            for (int64_t d = 0; d < part.head_dim; ++d) output[d] += sum;
        }
        add_values<States, H>(part, first, count, head, scaled);
    }
}

template <class States, int H>
inline void attend_records(const Attention& a, int64_t head) {
    float scores[H][kTokens];
    for (int64_t first = 0; first < a.tokens; first += kTokens) {
        const int64_t count = smaller(kTokens, a.tokens - first);
        score_records<States, H>(a, first, count, head, scores);
        for (int h = 0; h < H; ++h) weigh(a, first, count, head + h, scores[h]);
        add_records<States, H>(a, first, count, head, scores);
    }
}
