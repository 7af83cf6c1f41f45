#define POLICY_LOSS_BYTES 16
#include "policy_loss_tokens.h"

namespace acpo {
const TokenKernels policy_loss_baseline = token_kernels;
}
