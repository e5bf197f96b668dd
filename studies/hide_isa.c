/* Hides instruction sets of an x86-64 Linux machine from one program, so that it runs as on an older CPU, at full speed.

     cc -O2 -shared -fPIC -o hide_isa.so hide_isa.c
     LD_PRELOAD=./hide_isa.so HIDE_ISA="amx vnni avx512" python ...

   Libraries such as ONNX Runtime and PyTorch ask the CPUID instruction what they may use. The kernel can make that
   instruction fault (arch_prctl, on CPUs with cpuid_fault); the handler answers in its place with some bits cleared.
   /proc/cpuinfo is not changed. Exits with 99 where CPUs cannot do it. Handlers that a program installs for SIGSEGV itself
   (Python's faulthandler, Triton) are left out. */

#define _GNU_SOURCE
#include <asm/prctl.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define BIT(n) (1u << (n))

/* leaf 7, sub-leaf 0: ebx, ecx, edx; sub-leaf 1: eax */
static uint32_t hidden_ebx, hidden_ecx, hidden_edx, hidden_eax1;

static long allow_cpuid(int allowed) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, allowed); }

typedef int (*set_action)(int, const struct sigaction *, struct sigaction *);
typedef sighandler_t (*set_handler)(int, sighandler_t);
static int hiding;

static int real_sigaction(int number, const struct sigaction *action, struct sigaction *before) {
  return ((set_action)dlsym(RTLD_NEXT, "sigaction"))(number, action, before);
}

int sigaction(int number, const struct sigaction *action, struct sigaction *before) {
  return real_sigaction(number, number == SIGSEGV && hiding ? 0 : action, before);
}

sighandler_t signal(int number, sighandler_t handler) {
  if (number == SIGSEGV && hiding)
    return SIG_DFL;
  return ((set_handler)dlsym(RTLD_NEXT, "signal"))(number, handler);
}

static void answer(int number, siginfo_t *info, void *context) {
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  const uint8_t *instruction = (const uint8_t *)registers[REG_RIP];
  (void)info;
  if (instruction[0] != 0x0f || instruction[1] != 0xa2) { /* not CPUID: a real fault, which happens again */
    struct sigaction ordinary;
    memset(&ordinary, 0, sizeof ordinary);
    ordinary.sa_handler = SIG_DFL;
    real_sigaction(number, &ordinary, 0);
    return;
  }
  uint32_t leaf = registers[REG_RAX], sub_leaf = registers[REG_RCX], a, b, c, d;
  allow_cpuid(1);
  __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(leaf), "c"(sub_leaf));
  allow_cpuid(0);
  if (leaf == 7 && sub_leaf == 0) {
    b &= ~hidden_ebx;
    c &= ~hidden_ecx;
    d &= ~hidden_edx;
  }
  if (leaf == 7 && sub_leaf == 1)
    a &= ~hidden_eax1;
  registers[REG_RAX] = a;
  registers[REG_RBX] = b;
  registers[REG_RCX] = c;
  registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void hide(void) {
  const char *names = getenv("HIDE_ISA");
  if (!names)
    return;
  if (strstr(names, "amx")) /* bf16, tile, int8 */
    hidden_edx |= BIT(22) | BIT(24) | BIT(25);
  if (strstr(names, "vnni")) { /* avx512_vnni; avx_vnni */
    hidden_ecx |= BIT(11);
    hidden_eax1 |= BIT(4);
  }
  if (strstr(names, "avx512")) { /* f dq ifma cd bw vl; vbmi vbmi2 vnni bitalg vpopcntdq; 4vnniw 4fmaps vp2intersect fp16; bf16 */
    hidden_ebx |= BIT(16) | BIT(17) | BIT(21) | BIT(28) | BIT(30) | BIT(31);
    hidden_ecx |= BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14);
    hidden_edx |= BIT(2) | BIT(3) | BIT(8) | BIT(23);
    hidden_eax1 |= BIT(5);
  }
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = answer;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  real_sigaction(SIGSEGV, &action, 0);
  hiding = 1;
  if (allow_cpuid(0))
    _exit(99);
}
