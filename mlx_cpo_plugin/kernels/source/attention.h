// Attention of consecutive queries that keeps no scores: they are computed again in the backward pass.
// Source: FlashAttention, Dao et al. 2022, arXiv 2205.14135, with blocks of queries alone.
#pragma once

#include "numbers.h"
#include "operation.h"

namespace cpo {

// Consecutive queries that see a prefix of keys, and of their own keys those up to themselves.
struct Segment {
  int64_t first_query, queries, first_prefix_key, prefix_keys, first_own_key;
};

struct AttentionOptions {
  float scale;
  int64_t window;  // keys that a query sees, itself included
  std::vector<Segment> segments;
};

// A block of queries of a segment, and the positions of the keys that some of them see.
struct Block {
  const Segment& segment;
  int64_t begin, end;    // queries, within the segment
  int64_t first, stop;   // positions of keys
  int64_t window;

  Block(const Segment& segment, int64_t begin, int64_t size, int64_t window)
      : segment(segment), begin(begin), end(std::min(begin + size, segment.queries)), window(window) {
    first = first_of(begin);
    stop = segment.prefix_keys + end;
  }

  int64_t rows() const {
    return end - begin;
  }
  int64_t width() const {
    return stop - first;
  }
  int64_t first_of(int64_t query) const {
    return std::max<int64_t>(0, segment.prefix_keys + query + 1 - window);
  }
  int64_t query_row(int64_t row) const {
    return segment.first_query + begin + row;
  }

  // Calls ``use(first key, keys, first column)`` for the keys in the prefix, then for the segment's own.
  template <typename Use>
  void over_keys(Use use) const {
    int64_t border = std::clamp(segment.prefix_keys, first, stop);
    if (border > first) {
      use(segment.first_prefix_key + first, border - first, int64_t(0));
    }
    if (stop > border) {
      use(segment.first_own_key + border - segment.prefix_keys, stop - border, border - first);
    }
  }

  // Columns [begin, end) that a row sees.
  Range seen(int64_t row) const {
    return {first_of(begin + row) - first, segment.prefix_keys + begin + row + 1 - first};
  }
};

constexpr int64_t kQueries = 64;
// Numbers that the sums of all heads have at most, and how many tasks there are where these would have more.
constexpr int64_t kMostSums = 1 << 24, kFewestTasks = 8;

// The rows of one head.
struct Rows {
  float* data;
  int64_t stride;

  float* at(int64_t row) const {
    return data + row * stride;
  }
};

// Scores to base 2 of a block.
inline void compute_scores(const Block& block, Rows q, Rows k, int64_t size, float scale, float* scores) {
  block.over_keys([&](int64_t key, int64_t keys, int64_t column) {
    multiply(
        kPlain, kTransposed, block.rows(), keys, size, scale * kPerLog2, q.at(block.query_row(0)), q.stride, k.at(key),
        k.stride, 0, scores + column, block.width());
  });
}

template <typename Use>
void over_blocks(const AttentionOptions& options, Use use) {
  for (auto& segment : options.segments) {
    for (int64_t begin = 0; begin < segment.queries; begin += kQueries) {
      use(Block(segment, begin, kQueries, options.window));
    }
  }
}

inline double attention_work(const AttentionOptions& options, int64_t heads, int64_t size) {
  double seen = 0;
  over_blocks(options, [&](const Block& block) { seen += double(block.rows()) * block.width(); });
  return 4 * seen * heads * size;
}

// Calls ``use(batch, head)`` for all heads of queries, on all threads.
template <typename Use>
void over_heads(const array& queries, double work, Use use) {
  int64_t heads = queries.shape(1);
  in_parts(queries.shape(0) * heads, 1, work, [&](Range range) {
    for (int64_t at = range.begin; at < range.end; ++at) {
      use(at / heads, at % heads);
    }
  });
}

// Inputs: q, k, v, the log-sums, d output. Outputs: dq, dk, dv.
class AttentionGradient : public Shared<AttentionGradient> {
 public:
  explicit AttentionGradient(AttentionOptions options) : options_(std::move(options)) {}
  DEFINE_NAME(CPOAttentionGradient)

  bool splits_heads() const override {
    return true;
  }

 private:
  void compute(const Arrays& in, Arrays& out) override {
    int64_t heads = in[0].shape(1), queries = in[0].shape(2), size = in[0].shape(3);
    int64_t key_heads = in[1].shape(1), keys = in[1].shape(2), value_size = in[2].shape(3), batch = in[0].shape(0);
    // Heads that share keys have sums of their own, so that they can work at the same time, and where these would take
    // much memory, several have one.
    int64_t group = heads / key_heads, parts = group, numbers = keys * (size + value_size);
    if (batch * heads * numbers > kMostSums) {
      parts = std::clamp<int64_t>(kFewestTasks / (batch * key_heads), 1, group);
    }
    bool direct = parts == 1;
    std::vector<float> dk_parts(direct ? 0 : batch * key_heads * parts * keys * size);
    std::vector<float> dv_parts(direct ? 0 : batch * key_heads * parts * keys * value_size);
    Heads q(in[0]), k(in[1]), v(in[2]), grad(in[4]), dq(out[0]), dk_out(out[1]), dv_out(out[2]);
    in_parts(batch * key_heads * parts, 1, 2.5 * attention_work(options_, heads, size), [&](Range tasks) {
      for (int64_t task = tasks.begin; task < tasks.end; ++task) {
        int64_t row = task / parts / key_heads, key_head = task / parts % key_heads;
        Rows dk{direct ? dk_out.head(row, key_head) : &dk_parts[task * keys * size], direct ? dk_out.row_stride : size};
        Rows dv{
            direct ? dv_out.head(row, key_head) : &dv_parts[task * keys * value_size],
            direct ? dv_out.row_stride : value_size};
        for (int64_t key = 0; direct && key < keys; ++key) {
          std::fill_n(dk.at(key), size, 0.0f), std::fill_n(dv.at(key), value_size, 0.0f);
        }
        Range members = part_of(group, task % parts, parts);
        for (int64_t head = key_head * group + members.begin; head < key_head * group + members.end; ++head) {
          one_head(
              {q.head(row, head), q.row_stride}, {k.head(row, key_head), k.row_stride},
              {v.head(row, key_head), v.row_stride}, {grad.head(row, head), grad.row_stride},
              {dq.head(row, head), dq.row_stride}, in[3].data<float>() + (row * heads + head) * queries, size,
              value_size, dk, dv);
        }
      }
    });
    if (!direct) {
      add_parts(dk_parts, out[1], parts);
      add_parts(dv_parts, out[2], parts);
    }
  }

  void one_head(
      Rows q, Rows k, Rows v, Rows grad, Rows dq, const float* log_sums, int64_t size, int64_t value_size, Rows dk,
      Rows dv) {
    over_blocks(options_, [&](const Block& block) {
      int64_t width = block.width(), rows = block.rows(), first = block.query_row(0);
      float *weights = scratch(2, rows * width), *slopes = scratch(3, rows * width);
      compute_scores(block, q, k, size, options_.scale, weights);
      block.over_keys([&](int64_t key, int64_t count, int64_t column) {
        multiply(
            kPlain, kTransposed, rows, count, value_size, 1, grad.at(first), grad.stride,
            v.at(key), v.stride, 0, slopes + column, width);
      });
      for (int64_t i = 0; i < rows; ++i) {
        float *weight = weights + i * width, *slope = slopes + i * width, log_sum = log_sums[first + i];
        Range seen = block.seen(i);
        std::fill(weight, weight + seen.begin, 0.0f), std::fill(slope, slope + seen.begin, 0.0f);
        for (int64_t j = seen.begin; j < seen.end; ++j) {
          weight[j] = power_of_two(weight[j] - log_sum);
        }
        // The same as the product of the output with its gradient, which would have to be kept for that.
        float delta = sum_of(seen.size(), [&](int64_t j) { return weight[seen.begin + j] * slope[seen.begin + j]; });
        for (int64_t j = seen.begin; j < seen.end; ++j) {
          slope[j] = weight[j] * (slope[j] - delta);
        }
        std::fill(weight + seen.end, weight + width, 0.0f), std::fill(slope + seen.end, slope + width, 0.0f);
      }
      float beta = 0;
      block.over_keys([&](int64_t key, int64_t count, int64_t column) {
        multiply(
            kPlain, kPlain, rows, size, count, options_.scale, slopes + column, width, k.at(key), k.stride,
            beta, dq.at(first), dq.stride);
        multiply(
            kTransposed, kPlain, count, size, rows, options_.scale, slopes + column, width, q.at(first), q.stride,
            1, dk.at(key), dk.stride);
        multiply(
            kTransposed, kPlain, count, value_size, rows, 1, weights + column, width, grad.at(first), grad.stride, 1,
            dv.at(key), dv.stride);
        beta = 1;
      });
    });
  }

  // [B, H / G, parts, S, D] -> [B, H / G, S, D]
  static void add_parts(const std::vector<float>& parts, array& sums, int64_t count) {
    Heads sums_(sums);
    int64_t heads = sums.shape(1), keys = sums.shape(2), size = sums.shape(3);
    in_parts(sums.shape(0) * keys, 1, double(parts.size()), [&](Range range) {
      for (int64_t at = range.begin; at < range.end; ++at) {
        int64_t row = at / keys, key = at % keys;
        for (int64_t head = 0; head < heads; ++head) {
          float* sum = sums_.head(row, head) + key * sums_.row_stride;
          std::fill(sum, sum + size, 0.0f);
          for (int64_t member = 0; member < count; ++member) {
            const float* part = &parts[(((row * heads + head) * count + member) * keys + key) * size];
            for (int64_t i = 0; i < size; ++i) {
              sum[i] += part[i];
            }
          }
        }
      }
    });
  }

  AttentionOptions options_;
};

// Inputs: q [B, H, N, D], k [B, H / G, S, D], v [B, H / G, S, V]. Outputs: [B, H, N, V], and the base-2 logarithm of
// the sum of each query's exponentials [B, H, N].
class Attention : public Shared<Attention> {
 public:
  Attention(AttentionOptions options, bool cheap) : options_(std::move(options)), cheap_(cheap) {}
  DEFINE_NAME(CPOAttention)

  bool is_cheap() const override {
    return cheap_;
  }

  bool splits_heads() const override {
    return true;
  }

  Arrays vjp(
      const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
      const Arrays& outputs) override {
    Arrays inputs = primals;
    inputs.insert(inputs.end(), {outputs[1], cotangents[0]});
    Arrays gradients =
        apply<AttentionGradient>({primals[0].shape(), primals[1].shape(), primals[2].shape()}, inputs, options_);
    return asked_for(argnums, 3, [&](int argnum) { return gradients[argnum]; });
  }

 private:
  void compute(const Arrays& in, Arrays& out) override {
    int64_t heads = in[0].shape(1), queries = in[0].shape(2), size = in[0].shape(3), value_size = in[2].shape(3);
    int64_t group = heads / in[1].shape(1);
    Heads q_(in[0]), k_(in[1]), v_(in[2]), o_(out[0]);
    over_heads(in[0], attention_work(options_, heads, size), [&](int64_t row, int64_t head) {
      Rows q{q_.head(row, head), q_.row_stride}, k{k_.head(row, head / group), k_.row_stride};
      Rows v{v_.head(row, head / group), v_.row_stride}, o{o_.head(row, head), o_.row_stride};
      float* log_sums = out[1].data<float>() + (row * heads + head) * queries;
      over_blocks(options_, [&](const Block& block) {
        int64_t width = block.width(), rows = block.rows(), first = block.query_row(0);
        float* weights = scratch(2, rows * width);
        compute_scores(block, q, k, size, options_.scale, weights);
        for (int64_t i = 0; i < rows; ++i) {
          log_sums[first + i] = softmax(weights + i * width, block.seen(i), width);
        }
        float beta = 0;
        block.over_keys([&](int64_t key, int64_t count, int64_t column) {
          multiply(
              kPlain, kPlain, rows, value_size, count, 1, weights + column, width, v.at(key), v.stride, beta,
              o.at(first), o.stride);
          beta = 1;
        });
      });
    });
  }

  // Turns scores into weights in place; returns the logarithm of the sum.
  static float softmax(float* row, Range seen, int64_t width) {
    float highest = max_of(row + seen.begin, seen.size());
    std::fill(row, row + seen.begin, 0.0f);
    for (int64_t i = seen.begin; i < seen.end; ++i) {
      row[i] = power_of_two(row[i] - highest);
    }
    std::fill(row + seen.end, row + width, 0.0f);
    float total = sum_of(seen.size(), [&](int64_t i) { return row[seen.begin + i]; });
    for (int64_t i = seen.begin; i < seen.end; ++i) {
      row[i] /= total;
    }
    return highest + std::log2(total);
  }

  AttentionOptions options_;
  bool cheap_;
};

// The queries of each segment follow those of the one before, and the keys that they see exist.
inline bool is_complete(const std::vector<Segment>& segments, int64_t queries, int64_t keys) {
  int64_t end = 0;
  for (auto& [first_query, count, first_prefix_key, prefix_keys, first_own_key] : segments) {
    if (first_query != end || std::min({count, first_prefix_key, prefix_keys, first_own_key}) < 0 ||
        first_prefix_key + prefix_keys > keys || first_own_key + count > keys) {
      return false;
    }
    end += count;
  }
  return end == queries;
}

// Numbers: scale, window (0: none), and five for each segment, after how many there are.
inline Arrays attention(const Arrays& inputs, const double* numbers) {
  AttentionOptions options{float(numbers[0]), numbers[1] ? int64_t(numbers[1]) : INT32_MAX, {}};
  for (int i = 0; i < int(numbers[2]); ++i) {
    const double* n = numbers + 3 + 5 * i;
    options.segments.push_back({int64_t(n[0]), int64_t(n[1]), int64_t(n[2]), int64_t(n[3]), int64_t(n[4])});
  }
  const array &q = inputs[0], &k = inputs[1], &v = inputs[2];
  require(is_wide(q) && is_wide(k) && is_wide(v) && q.ndim() == 4 && k.ndim() == 4 && v.ndim() == 4);
  require(k.shape(0) == q.shape(0) && k.shape(3) == q.shape(3) && q.shape(1) % k.shape(1) == 0);
  require(v.shape(0) == k.shape(0) && v.shape(1) == k.shape(1) && v.shape(2) == k.shape(2));
  require(options.window > 0 && is_complete(options.segments, q.shape(2), k.shape(2)));
  Shape logs = q.shape();
  logs.pop_back();
  // No more work than a product of the output with a square matrix.
  double width = double(q.shape(1)) * q.shape(3), rows = double(q.shape(0)) * q.shape(2);
  bool cheap = q.shape(0) * attention_work(options, q.shape(1), q.shape(3)) <= 2 * rows * width * width;
  return apply<Attention>({with_last(inputs[0].shape(), inputs[2].shape(3)), logs}, inputs, options, cheap);
}

}  // namespace cpo
