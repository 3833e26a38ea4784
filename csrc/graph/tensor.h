// Tensor: one of a run's activations, as data: how wide, how many rows, of which type. Part of a
// ModelGraph.
#pragma once

#include <cstdint>
#include <string>

namespace flowprefill {

enum class ElementType : uint8_t {
  kFloat,       // 32 bits on every device
  kActivation,  // what the device multiplies: float or bf16
  kProduct,     // what a product leaves before it is rounded to an activation: float or bf16
  kToken,       // int32
};

// How many rows a tensor has.
enum class Extent : uint8_t {
  kPrompt,    // one for each row of the batch
  kTile,      // one for each row of the tile that goes through a layer together
  kHeadTile,  // one for each row of the tile that goes through what follows the layers together
  kSequence,  // one for each sequence of the batch
};

struct Tensor {
  std::string name;
  int32_t columns = 0;
  ElementType type = ElementType::kFloat;
  Extent extent = Extent::kTile;
};

// Bytes of one element of each type on a device.
struct ElementBytes {
  int32_t activation = 2;
  int32_t product = 4;

  int32_t of(ElementType type) const {
    switch (type) {
      case ElementType::kActivation:
        return activation;
      case ElementType::kProduct:
        return product;
      case ElementType::kFloat:
      case ElementType::kToken:
        break;
    }
    return 4;
  }
};

}  // namespace flowprefill
