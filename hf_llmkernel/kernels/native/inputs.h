// Activations in the representations that matrices ask for, and the memory for them.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "kernels.h"

namespace llmk {

// Memory of one thread, handed out piece by piece and taken back as a whole; it grows to what was needed at most.
class Arena {
  public:
    template <class T>
    T* take(int64_t count) {
        const size_t bytes = static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), kLine));
        if (used_ + bytes > size_) grow(bytes);
        T* piece = reinterpret_cast<T*>(memory_.get() + used_);
        used_ += bytes;
        return piece;
    }
    void clear() {
        used_ = 0;
        old_.clear();
    }

  private:
    struct Free {
        void operator()(uint8_t* p) const { std::free(p); }
    };
    using Memory = std::unique_ptr<uint8_t, Free>;

    void grow(size_t bytes) {
        size_ = 2 * size_ + bytes;
        auto* fresh = static_cast<uint8_t*>(std::aligned_alloc(kLine, static_cast<size_t>(round_up(static_cast<int64_t>(size_), kLine))));
        if (fresh == nullptr) throw std::bad_alloc();
        if (memory_) old_.push_back(std::move(memory_));  // pieces of it are in use
        memory_.reset(fresh);
        used_ = 0;
    }

    Memory memory_;
    std::vector<Memory> old_;
    size_t size_ = 0, used_ = 0;
};

// Rows of activations for all matrices that take them.
class InputSet {
  public:
    InputSet() = default;
    InputSet(int64_t rows, int64_t columns) : rows_(rows), columns_(columns) {}

    // Makes room for what a matrix takes; before any `fill`.
    void add(Arena& arena, const llmk_matrix& w) {
        if (w.kind == LLMK_F32 || find(w) != nullptr) return;
        Inputs& inputs = inputs_[count_];
        groups_[count_++] = is_integer(w.kind) ? padding_group(w) : kWords;
        inputs.rows = rows_;
        inputs.padded = is_integer(w.kind) ? padded_columns(w) : round_up(columns_, kSegment);
        const int64_t all = rows_ * inputs.padded;
        if (!is_integer(w.kind)) {
            inputs.bf16 = arena.take<uint16_t>(all);
            return;
        }
        inputs.codes = arena.take<int8_t>(all);
        inputs.scales = arena.take<float>(all / kSegment);
        inputs.sums = arena.take<int32_t>(all / kSegment);
    }

    // Where x [M, columns] is, and stays while matrices are multiplied; it need not be written before `fill`.
    void read(const float* x, int64_t stride) {
        floats_ = x;
        stride_ = stride;
    }

    // Rows begin ... end, for all matrices; other threads may fill others.
    void fill(int64_t begin, int64_t end) const {
        for (int i = 0; i < count_; ++i)
            for (int64_t row = begin; row < end; ++row) fill_row(i, row);
    }

    Inputs of(const llmk_matrix& w) const {
        Inputs inputs;
        if (const Inputs* known = find(w)) inputs = *known;
        inputs.rows = rows_;
        inputs.floats = floats_;
        inputs.float_stride = stride_;
        return inputs;
    }

  private:
    static constexpr int64_t kWords = -1;

    const Inputs* find(const llmk_matrix& w) const {
        const int64_t group = is_integer(w.kind) ? padding_group(w) : kWords;
        for (int i = 0; i < count_; ++i)
            if (groups_[i] == group) return &inputs_[i];
        return nullptr;
    }

    void fill_row(int i, int64_t row) const {
        const Inputs& inputs = inputs_[i];
        const float* x = floats_ + row * stride_;
        const int64_t at = row * inputs.padded;
        if (groups_[i] == kWords) return kernels().to_bf16(x, columns_, inputs.padded, const_cast<uint16_t*>(inputs.bf16) + at);
        kernels().quantize(x, columns_, groups_[i], 1, const_cast<int8_t*>(inputs.codes) + at,
                           const_cast<float*>(inputs.scales) + at / kSegment, const_cast<int32_t*>(inputs.sums) + at / kSegment);
    }

    int64_t rows_ = 0, columns_ = 0, stride_ = 0;
    const float* floats_ = nullptr;
    int count_ = 0;
    int64_t groups_[4] = {};  // of the matrices that take the same rows, at most three, all may differ
    Inputs inputs_[4];
};

}  // namespace llmk
