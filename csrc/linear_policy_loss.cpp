#include "linear_policy_loss.h"

#include <algorithm>
#include <vector>

#include "buffer.h"
#include "head_kernels.h"
#include "threads.h"

namespace acpo {
namespace {

class Sweep {
 public:
  Sweep(const Head& head, const PolicyLoss& loss, const LinearPolicyLossResults& out, int threads)
      : head_(head), loss_(loss), out_(out), threads_(threads), tokens_(loss.hierarchy.tokens) {
    loss_.logp = {out.logp, Dtype::float32, 1};
    loss_.entropy = {out.entropy, Dtype::float32, 1};
    for (int64_t t = 0; t < tokens_; ++t) {
      if (loss.mask == nullptr || loss.mask[t]) rows_.push_back(t);
    }
    if (loss_.denominator == 0.0 && !loss_.denominators) loss_.denominator = std::max(1.0, static_cast<double>(rows_.size()));
    maximum_.resize(static_cast<size_t>(tokens_));
    logsumexp_.resize(static_cast<size_t>(tokens_));
  }

  void run() {
    const bool wanted = out_.hidden != nullptr || out_.weight != nullptr || out_.bias != nullptr;
    if (!wanted) {
      forward(rows_, nullptr);
      policy_loss(loss_, out_.loss, out_.metrics, nullptr, nullptr, threads_);
      return;
    }
    grad_logp_.resize(static_cast<size_t>(tokens_));
    grad_entropy_.resize(static_cast<size_t>(tokens_));
    if (loss_.grouped() && count() > LOGITS_ROWS) {
      forward(rows_, nullptr);
      policy_loss(loss_, out_.loss, out_.metrics, grad_logp_.data(), grad_entropy_.data(), threads_);
      backward(with_gradient(0, count()), nullptr, true);
    } else {
      const Buffer logits = tile();
      for (int64_t begin = 0; begin < count(); begin += LOGITS_ROWS) {
        const int64_t end = std::min(begin + LOGITS_ROWS, count());
        forward({rows_.begin() + begin, rows_.begin() + end}, logits.get());
        if (loss_.grouped()) {
          policy_loss(loss_, out_.loss, out_.metrics, grad_logp_.data(), grad_entropy_.data(), threads_);
        } else {
          policy_loss_gradients(loss_, rows_[begin], rows_[end - 1] + 1, grad_logp_.data(), grad_entropy_.data(), threads_);
        }
        gradient(begin, end, logits.get());
      }
      flush(true);
      policy_loss(loss_, out_.loss, out_.metrics, nullptr, nullptr, threads_);
    }
    if (!added_) backward({}, nullptr, true);  // no row has a gradient: zeros
    if (summed_) head_round(head_, sum_.get(), out_.weight, threads_);
  }

 private:
  // Of one size whatever the rows are, so that the next call finds it again; what is not touched takes no memory.
  Buffer tile() const { return Buffer(head_logits_size(head_.vocab, LOGITS_ROWS)); }

  int64_t count() const { return static_cast<int64_t>(rows_.size()); }

  // Those of rows_[begin, end) whose gradient is not exactly 0; a NaN is not.
  std::vector<int64_t> with_gradient(int64_t begin, int64_t end) const {
    std::vector<int64_t> result;
    for (int64_t i = begin; i < end; ++i) {
      if (grad_logp_[rows_[i]] != 0.0f || grad_entropy_[rows_[i]] != 0.0f) result.push_back(rows_[i]);
    }
    return result;
  }

  Head at(const std::vector<int64_t>& rows) const {
    Head head = head_;
    head.rows = rows.data();
    head.count = static_cast<int64_t>(rows.size());
    return head;
  }

  HeadStatistics statistics() { return {out_.logp, out_.entropy, maximum_.data(), logsumexp_.data()}; }

  void forward(const std::vector<int64_t>& rows, float* logits) { head_forward(at(rows), logits, statistics(), threads_); }

  // dWeight of several calls is summed in float32; `last`: none comes after this one, which rounds it.
  void backward(const std::vector<int64_t>& rows, float* logits, bool last) {
    if (rows.empty() && added_) return;
    HeadGradient to{grad_logp_.data(), grad_entropy_.data(), out_.hidden, head_.dtype, out_.weight, head_.dtype, out_.bias, added_};
    if (out_.weight != nullptr && head_.dtype != Dtype::float32) {
      if (!last && sum_.get() == nullptr) sum_ = Buffer(head_.vocab * head_.width);
      if (!last || added_) to.sum = sum_.get();
      if (!last) to.weight = nullptr;
      summed_ = !last;
    }
    head_backward(at(rows), logits, statistics(), to, threads_);
    added_ = true;
  }

  // A tile without gaps goes on as it is; of any other the rows with a gradient wait beside those of the tiles before, until they are
  // as many as a tile.
  void gradient(int64_t begin, int64_t end, float* logits) {
    const std::vector<int64_t> rows = with_gradient(begin, end);
    const int64_t some = static_cast<int64_t>(rows.size()), held = static_cast<int64_t>(held_rows_.size());
    if (some == end - begin) {
      backward(rows, logits, end == count() && held == 0);
      return;
    }
    if (some == 0) return;
    if (held + some > LOGITS_ROWS) flush(false);
    if (held_.get() == nullptr) held_ = tile();
    const int64_t first = static_cast<int64_t>(held_rows_.size()), padded = (first + some + PANEL - 1) / PANEL * PANEL;
    std::vector<int64_t> from;  // places in the tile
    for (int64_t i = begin, k = 0; i < end && k < some; ++i) {
      if (rows_[i] == rows[k]) from.push_back(i - begin), ++k;
    }
    float* const to = held_.get();
    const auto place = [&](int64_t row, int64_t v) { return (row / PANEL * head_.vocab + v) * PANEL + row % PANEL; };
    parallel_for(head_.vocab, 1 << 10, threads_, [&](int64_t v, int64_t last) {
      for (; v < last; ++v) {
        for (int64_t k = 0; k < some; ++k) to[place(first + k, v)] = logits[place(from[k], v)];
        for (int64_t row = first + some; row < padded; ++row) to[place(row, v)] = 0.0f;  // lanes that are read and count for nothing
      }
    });
    held_rows_.insert(held_rows_.end(), rows.begin(), rows.end());
  }

  void flush(bool last) {
    if (!held_rows_.empty()) backward(held_rows_, held_.get(), last);
    held_rows_.clear();
  }

  const Head& head_;
  PolicyLoss loss_;
  const LinearPolicyLossResults& out_;
  const int threads_;
  const int64_t tokens_;
  bool added_ = false;         // the gradients of weight and bias hold something already,
  bool summed_ = false;        // that of weight in sum_ alone
  std::vector<int64_t> rows_;  // not masked
  std::vector<float> maximum_, logsumexp_, grad_logp_, grad_entropy_;
  Buffer held_, sum_;
  std::vector<int64_t> held_rows_;
};

}  // namespace

void linear_policy_loss(const Head& head, const PolicyLoss& loss, const LinearPolicyLossResults& out, int threads) {
  loss.hierarchy.check();
  Sweep(head, loss, out, threads).run();
}

}  // namespace acpo
