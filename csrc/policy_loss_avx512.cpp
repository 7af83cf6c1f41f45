#define POLICY_LOSS_BYTES 64
#include "policy_loss_tokens.h"

namespace acpo {
const TokenKernels policy_loss_avx512 = token_kernels;
}
