// WeightTable: which tensors of a checkpoint make up a model's weights, and where each goes. Part
// of a ModelGraph; a device's weights are filled through it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace flowprefill {

enum class WeightKind : uint8_t {
  kMatrix,  // [rows, columns], multiplied
  kTable,   // [rows, columns], looked up by row
  kVector,  // [rows] float
};

enum class PartOrder : uint8_t {
  kStacked,  // one part's rows below the other's
  kPaired,  // gate's parts, then as many of up of the same rows; the device says how they alternate
};

// Rows [first_row, first_row + rows) of one tensor of the checkpoint.
struct WeightPart {
  std::string source;
  int64_t rows = 0;
  int64_t first_row = 0;
};

struct Weight {
  std::string name;
  WeightKind kind = WeightKind::kMatrix;
  int64_t columns = 1;  // of vectors: 1
  PartOrder order = PartOrder::kStacked;
  float offset = 0;  // added to every value: some families store a norm's weight less one
  std::vector<WeightPart> parts;
  int64_t stored_bytes = 0;  // what a product reads; 0: the device's elements

  int64_t rows() const;
};

class WeightTable {
 public:
  // Called for each weight that takes rows of a tensor: the weight's index, the part's index, and
  // the part's values, float, row-major.
  using Sink = std::function<void(int32_t weight, int32_t part, const float* values)>;

  WeightTable() = default;
  // Throws std::invalid_argument naming the weight: no parts, no rows, kPaired without gate and
  // up parts of equal rows, one name twice.
  explicit WeightTable(std::vector<Weight> weights);

  const std::vector<Weight>& weights() const { return weights_; }
  const Weight& weight(int32_t index) const { return weights_[static_cast<size_t>(index)]; }
  // Index of the weight; throws std::invalid_argument for an unknown name.
  int32_t index(const std::string& name) const;

  // Tells what the device keeps of a weight, for the prediction of its products.
  void set_stored_bytes(int32_t index, size_t bytes) {
    weights_[static_cast<size_t>(index)].stored_bytes = static_cast<int64_t>(bytes);
  }

  // Tells which weights take rows of a tensor [rows, columns]: the weight's index, the part's
  // index. Throws as deal().
  using UseSink = std::function<void(int32_t weight, int32_t part)>;
  void each_use(const std::string& source, int64_t rows, int64_t columns,
                const UseSink& sink) const;

  // Hands a tensor, float [rows, columns] row-major, to the weights it belongs to. Throws
  // std::invalid_argument for an unknown name or a wrong shape.
  void deal(const std::string& source, const float* values, int64_t rows, int64_t columns,
            const Sink& sink) const;

  // Throws std::invalid_argument naming a tensor, and its shape, that is not among `arrived`.
  void require_all(const std::set<std::string>& arrived) const;

 private:
  struct Use {
    int32_t weight;
    int32_t part;
  };

  void check_shape(const std::string& source, int64_t rows, int64_t columns) const;
  int64_t rows_of(const std::string& source) const;

  std::vector<Weight> weights_;
  std::vector<std::string> sources_;  // names of all tensors, in the order that weights want them
  std::map<std::string, std::vector<Use>> uses_;
  std::map<std::string, int32_t> index_;
};

}  // namespace flowprefill
