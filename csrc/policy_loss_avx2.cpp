#define POLICY_LOSS_BYTES 32
#include "policy_loss_tokens.h"

namespace acpo {
const TokenKernels policy_loss_avx2 = token_kernels;
}
