#include "devices/cuda/backend/refusal.h"

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
        require(op_.scale == 1.0, "scale", std::to_string(op_.scale), "1");
        break;
      case OperatorKind::kNorm:
        require_columns(op_.input);
        break;
      case OperatorKind::kLinear:
        check_linear();
        break;
      case OperatorKind::kRope:
        check_rope();
        break;
      case OperatorKind::kAttention:
        require_head_dim();
        require(op_.softcap == 0, "softcap", std::to_string(op_.softcap), "0");
        break;
      case OperatorKind::kResidual:
        require(false, "kind", "residual", "another: there is no kernel for it");
        break;
      case OperatorKind::kRound:
        require(false, "kind", "round", "another: there is no kernel for it");
        break;
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
    require(dim == 64 || dim == 96 || dim == 128, "head_dim", std::to_string(dim), "64, 96 or 128");
  }

  void check_linear() {
    require_columns(op_.input);
    if (op_.output != g_.logits())  // rows of the logits have room for the padding
      require_columns(op_.output);
    require(op_.scale == 1.0, "scale", std::to_string(op_.scale), "1");
    require(op_.softcap == 0, "softcap", std::to_string(op_.softcap), "0");
    require(op_.epilogue != Epilogue::kGate || op_.activation == Activation::kSilu, "activation",
            "gelu_tanh", "silu");
  }

  void check_rope() {
    require_head_dim();
    const int32_t turning = g_.tensor(op_.rotary).columns;
    require(turning == g_.attention.head_dim, "rotary columns", std::to_string(turning),
            "head_dim = " + std::to_string(g_.attention.head_dim));
    if (op_.q_norm < 0)
      return;
    const int64_t normed = g_.weights.weight(op_.q_norm).rows();
    require(normed == g_.attention.head_dim, "q_norm rows", std::to_string(normed),
            "head_dim = " + std::to_string(g_.attention.head_dim));
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
        return require_bf16(op_.output);
      case OperatorKind::kLinear:
        require_bf16(op_.input);
        if (op_.epilogue == Epilogue::kAdd)
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
      case OperatorKind::kResidual:
      case OperatorKind::kRound:
        break;
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
