#include "devices/cuda/backend/refusal.h"

#include "devices/cuda/kernels/attention_args.h"
#include "graph/layout.h"

namespace flowprefill {
namespace {

// The first thing about an operator that no kernel takes.
class Refusal {
 public:
  Refusal(const ModelGraph& graph, const Operator& op) : g_(graph), op_(op) {}

  std::string reason() {
    switch (op_.kind) {
      case OperatorKind::kEmbed:
        require_columns(op_.output);
        break;
      case OperatorKind::kNorm:
      case OperatorKind::kResidual:
        require_columns(op_.input);
        break;
      case OperatorKind::kRound:
        require_columns(op_.input);
        require(!g_.is_gather(op_), "output extent", "sequence", "that of the input");
        break;
      case OperatorKind::kLinear:
        check_linear();
        break;
      case OperatorKind::kRope:
        check_rope();
        break;
      case OperatorKind::kAttention:
        require_head_dim();
        break;
      case OperatorKind::kRoute:
      case OperatorKind::kExperts:
        return "mixture of experts: got " + std::to_string(op_.slots) +
               " experts a row, expected a dense model on CUDA; device cpu takes them";
      case OperatorKind::kScore:
      case OperatorKind::kPool:
      case OperatorKind::kRotary:
      case OperatorKind::kSample:
        break;
    }
    check_types();
    return reason_;
  }

 private:
  void require(bool holds, const std::string& field, const std::string& got,
               const std::string& allowed) {
    if (!holds && reason_.empty())
      reason_ = field + ": got " + got + ", expected " + allowed + " on CUDA";
  }

  void require_columns(int32_t tensor) {
    const Tensor& t = g_.tensor(tensor);
    require(t.columns % 8 == 0, t.name + " columns", std::to_string(t.columns), "a multiple of 8");
  }
  void require_head_dim() {
    const int32_t dim = g_.attention.head_dim;
    require(has_attention_kernel(dim), "head_dim", std::to_string(dim), "64, 96, 128 or 256");
  }

  void check_linear() {
    require_columns(op_.input);
    if (!holds_logits(g_, op_.output))  // rows of logits have room for the padding
      require_columns(op_.output);
    if (op_.epilogue == Epilogue::kStore)
      return;
    require(op_.scale == 1.0, "scale", std::to_string(op_.scale), "1 with this epilogue");
    require(op_.softcap == 0, "softcap", std::to_string(op_.softcap), "0 with this epilogue");
  }

  void check_rope() {
    require_head_dim();
    const int32_t turning = g_.tensor(op_.rotary).columns;
    require(turning % 4 == 0, "rotary columns", std::to_string(turning), "a multiple of 4");
  }

  // Each kernel reads and writes elements of one size.
  void require_float(int32_t tensor) {
    const Tensor& t = g_.tensor(tensor);
    require(t.type == ElementType::kFloat, t.name + " type", "another", "float");
  }
  void require_bf16(int32_t tensor) {
    const Tensor& t = g_.tensor(tensor);
    require(t.type == ElementType::kActivation || t.type == ElementType::kProduct, t.name + " type",
            "another", "activation or product");
  }
  void check_types() {
    switch (op_.kind) {
      case OperatorKind::kEmbed:
      case OperatorKind::kRotary:
        return require_float(op_.output);
      case OperatorKind::kNorm:
        require_float(op_.input);
        return require(g_.output_of(op_).type != ElementType::kToken,
                       g_.output_of(op_).name + " type", "token", "another");
      case OperatorKind::kLinear:
        require_bf16(op_.input);
        if (op_.epilogue == Epilogue::kAdd || op_.softcap != 0)
          require_float(op_.output);
        if (op_.epilogue == Epilogue::kGate)
          require_bf16(op_.output);
        return require(g_.output_of(op_).type != ElementType::kToken,
                       g_.output_of(op_).name + " type", "token", "another");
      case OperatorKind::kRope:
        require_float(op_.rotary);
        require_bf16(op_.input);
        return require_bf16(op_.output);
      case OperatorKind::kAttention:
        require_bf16(op_.input);
        return require_bf16(op_.output);
      case OperatorKind::kSample:
        return require_float(op_.input);
      case OperatorKind::kRoute:
      case OperatorKind::kExperts:
        return;
      case OperatorKind::kResidual:
        require_float(op_.input);
        return require_float(op_.output);
      case OperatorKind::kRound:
        require_float(op_.input);
        return require_bf16(op_.output);
      case OperatorKind::kScore:
      case OperatorKind::kPool:
        require_float(op_.input);
        return require_float(op_.output);
    }
  }

  const ModelGraph& g_;
  const Operator& op_;
  std::string reason_;
};

}  // namespace

std::string refusal_of(const ModelGraph& graph, const Operator& op) {
  return Refusal(graph, op).reason();
}

}  // namespace flowprefill
