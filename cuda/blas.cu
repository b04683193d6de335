/* blas.cu - products of many rows: cuBLASLt. */
#include <cublasLt.h>

#include <map>
#include <tuple>

#include "common.cuh"

extern "C" int find_blas(void) { return 1; }

static void latch_blas(cublasStatus_t status, const char *what, int line) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  char text[256];
  snprintf(text, sizeof text, "%s (blas.cu:%d): cuBLASLt status %d%s", what, line, (int)status,
           status == CUBLAS_STATUS_ALLOC_FAILED ? ", out of memory" : "");
  device_fail(text);
}
#define CHECK_BLAS(call) latch_blas(call, #call, __LINE__)

enum { WORKSPACE = 64 << 20 };

static cublasLtHandle_t handle() {
  static cublasLtHandle_t h = [] {
    cublasLtHandle_t made = nullptr;
    CHECK_BLAS(cublasLtCreate(&made));
    return made;
  }();
  return h;
}
static void *workspace() {
  static void *p;
  if (!p) p = device_alloc(WORKSPACE);
  return p;
}

/* The plan for a product, found once: the heuristic's first choice is the same in every run. */
struct Plan {
  cublasLtMatmulDesc_t work;
  cublasLtMatrixLayout_t a, b, c;
  cublasLtMatmulAlgo_t algorithm;
  bool good;
};

static Plan make_plan(int type_c, size_t ldc, size_t lda, int ta, size_t ldb, int tb, int type_ab, size_t m, size_t n, size_t k) {
  /* Column-major: c^T (n,m) = op(b)^T op(a)^T. */
  const cudaDataType_t ab = type_ab == FLOAT32 ? CUDA_R_32F : CUDA_R_16BF, c = type_c == FLOAT32 ? CUDA_R_32F : CUDA_R_16BF;
  Plan p = {};
  cublasOperation_t first = tb ? CUBLAS_OP_T : CUBLAS_OP_N, second = ta ? CUBLAS_OP_T : CUBLAS_OP_N;
  CHECK_BLAS(cublasLtMatmulDescCreate(&p.work, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  CHECK_BLAS(cublasLtMatmulDescSetAttribute(p.work, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof first));
  CHECK_BLAS(cublasLtMatmulDescSetAttribute(p.work, CUBLASLT_MATMUL_DESC_TRANSB, &second, sizeof second));
  CHECK_BLAS(cublasLtMatrixLayoutCreate(&p.a, ab, tb ? k : n, tb ? n : k, ldb));
  CHECK_BLAS(cublasLtMatrixLayoutCreate(&p.b, ab, ta ? m : k, ta ? k : m, lda));
  CHECK_BLAS(cublasLtMatrixLayoutCreate(&p.c, c, n, m, ldc));
  cublasLtMatmulPreference_t preference = nullptr;
  size_t bytes = WORKSPACE;
  CHECK_BLAS(cublasLtMatmulPreferenceCreate(&preference));
  CHECK_BLAS(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes));
  cublasLtMatmulHeuristicResult_t found;
  int count = 0;
  CHECK_BLAS(cublasLtMatmulAlgoGetHeuristic(handle(), p.work, p.a, p.b, p.c, p.c, preference, 1, &found, &count));
  CHECK_BLAS(cublasLtMatmulPreferenceDestroy(preference));
  p.good = count > 0;
  if (p.good) p.algorithm = found.algo;
  return p;
}

void gemm(void *c, int type_c, size_t ldc, const void *a, size_t lda, int ta, const void *b, size_t ldb, int tb, int type_ab, int add,
          size_t m, size_t n, size_t k) {
  typedef std::tuple<int, size_t, size_t, int, size_t, int, int, size_t, size_t, size_t> Key;
  static std::map<Key, Plan> plans;
  if (!m || !n) return;
  const Key key(type_c, ldc, lda, ta, ldb, tb, type_ab, m, n, k);
  auto found = plans.find(key);
  if (found == plans.end()) found = plans.emplace(key, make_plan(type_c, ldc, lda, ta, ldb, tb, type_ab, m, n, k)).first;
  const Plan &p = found->second;
  if (!p.good) return latch_blas(CUBLAS_STATUS_NOT_SUPPORTED, "gemm", __LINE__);
  const float one = 1, beta = add ? 1 : 0;
  CHECK_BLAS(cublasLtMatmul(handle(), p.work, &one, b, p.a, a, p.b, &beta, c, p.c, c, p.c, &p.algorithm, workspace(), WORKSPACE, stream()));
}
