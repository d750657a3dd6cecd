/* Counts the operations by which a process changes files under one folder, and kills it at one of them.

   The kernel stops the process at every system call that can change a file (seccomp, SECCOMP_RET_TRAP), whoever makes
   it: Python, or a library that passes the C library by. The handler writes down what is about to happen, makes the call
   by an instruction that the kernel lets pass, and hands its result on. A program that this one executes would be
   killed at the first such call, for it has no handler. For Linux on x86-64 and ARM64. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

enum { NEVER, BEFORE, AFTER, WITHIN };

static char folder[PATH_MAX];
static int log_file = -1, how = NEVER;
static long victim = -1;
static atomic_long count;

/* A system call from the one place that is not stopped. */
long let_pass(long call, long a, long b, long c, long d, long e, long f);
extern char let_pass_begins[], let_pass_ends[];
#if defined(__x86_64__)
#define ARCHITECTURE AUDIT_ARCH_X86_64
__asm__(".text\nlet_pass_begins:\n"
        ".type let_pass, @function\nlet_pass:\n"
        "mov %rdi, %rax\nmov %rsi, %rdi\nmov %rdx, %rsi\nmov %rcx, %rdx\nmov %r8, %r10\nmov %r9, %r8\n"
        "mov 8(%rsp), %r9\nsyscall\nret\nlet_pass_ends:\n");
#elif defined(__aarch64__)
#define ARCHITECTURE AUDIT_ARCH_AARCH64
__asm__(".text\nlet_pass_begins:\n"
        ".type let_pass, %function\nlet_pass:\n"
        "mov x8, x0\nmov x0, x1\nmov x1, x2\nmov x2, x3\nmov x3, x4\nmov x4, x5\nmov x5, x6\nsvc #0\nret\n"
        "let_pass_ends:\n");
#else
#error "which register holds what is known for x86-64 and ARM64 alone"
#endif

static const int CALLS[] = {
#ifdef SYS_open
    SYS_open, SYS_creat, SYS_rename, SYS_unlink, SYS_rmdir, SYS_mkdir, SYS_link, SYS_symlink, SYS_chmod, SYS_renameat,
#endif
    SYS_openat, SYS_write, SYS_pwrite64, SYS_writev, SYS_pwritev, SYS_fsync, SYS_fdatasync, SYS_sync_file_range,
    SYS_truncate, SYS_ftruncate, SYS_fallocate, SYS_sendfile, SYS_copy_file_range, SYS_renameat2, SYS_unlinkat,
    SYS_mkdirat, SYS_linkat, SYS_symlinkat, SYS_fchmod, SYS_fchmodat, SYS_fchown, SYS_fchownat, SYS_utimensat,
};

static int is_within(const char *path) {
    size_t size = strlen(folder);
    return strncmp(path, folder, size) == 0 && (path[size] == '/' || path[size] == 0);
}

static void of_descriptor(long descriptor, char *buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%ld", descriptor);
    long size = let_pass(SYS_readlinkat, AT_FDCWD, (long)link, (long)buffer, PATH_MAX - 1, 0, 0);
    buffer[size < 0 ? 0 : size] = 0;
}

static void of_path(long at, long given, char *buffer) {
    const char *path = (const char *)given;
    char base[PATH_MAX] = "";
    if (path == NULL) {
        of_descriptor(at, buffer);
        return;
    }
    if (path[0] == '/') {
        snprintf(buffer, PATH_MAX, "%s", path);
        return;
    }
    if ((int)at == AT_FDCWD)
        let_pass(SYS_getcwd, (long)base, sizeof base, 0, 0, 0, 0);
    else
        of_descriptor((int)at, base);
    strncat(base, "/", sizeof base - strlen(base) - 1);
    strncat(base, path, sizeof base - strlen(base) - 1);
    memcpy(buffer, base, sizeof base);
}

static void end(void) {
    let_pass(SYS_kill, getpid(), SIGKILL, 0, 0, 0, 0);
    for (;;)
        let_pass(SYS_sched_yield, 0, 0, 0, 0, 0, 0);
}

/* What a call does, and to which paths; NULL where it changes nothing. */
static const char *described(long call, const long *v, char *path, char *other, long *size) {
    long flags = 0;
    switch (call) {
#ifdef SYS_open
    case SYS_open: of_path(AT_FDCWD, v[0], path); flags = v[1]; goto opened;
    case SYS_creat: of_path(AT_FDCWD, v[0], path); return "open, emptied";
    case SYS_rename: of_path(AT_FDCWD, v[0], path); of_path(AT_FDCWD, v[1], other); return "rename";
    case SYS_renameat: of_path(v[0], v[1], path); of_path(v[2], v[3], other); return "rename";
    case SYS_link: of_path(AT_FDCWD, v[0], path); of_path(AT_FDCWD, v[1], other); return "link";
    case SYS_unlink: of_path(AT_FDCWD, v[0], path); return "unlink";
    case SYS_rmdir: of_path(AT_FDCWD, v[0], path); return "rmdir";
    case SYS_mkdir: of_path(AT_FDCWD, v[0], path); return "mkdir";
    case SYS_symlink: of_path(AT_FDCWD, v[1], path); return "symlink";
    case SYS_chmod: of_path(AT_FDCWD, v[0], path); return "chmod";
#endif
    case SYS_openat: of_path(v[0], v[1], path); flags = v[2]; goto opened;
    case SYS_renameat2: of_path(v[0], v[1], path); of_path(v[2], v[3], other); return "rename";
    case SYS_linkat: of_path(v[0], v[1], path); of_path(v[2], v[3], other); return "link";
    case SYS_unlinkat: of_path(v[0], v[1], path); return v[2] & AT_REMOVEDIR ? "rmdir" : "unlink";
    case SYS_mkdirat: of_path(v[0], v[1], path); return "mkdir";
    case SYS_symlinkat: of_path(v[1], v[2], path); return "symlink";
    case SYS_fchmodat: of_path(v[0], v[1], path); return "chmod";
    case SYS_fchownat: of_path(v[0], v[1], path); return "chown";
    case SYS_utimensat: of_path(v[0], v[1], path); return "utime";
    case SYS_truncate: of_path(AT_FDCWD, v[0], path); *size = v[1]; return "truncate";
    case SYS_ftruncate: of_descriptor(v[0], path); *size = v[1]; return "truncate";
    case SYS_write: of_descriptor(v[0], path); *size = v[2]; return "write";
    case SYS_pwrite64: of_descriptor(v[0], path); *size = v[2]; return "write at";
    case SYS_writev: of_descriptor(v[0], path); return "write parts";
    case SYS_pwritev: of_descriptor(v[0], path); return "write parts";
    case SYS_sendfile: of_descriptor(v[0], path); *size = v[3]; return "copy";
    case SYS_copy_file_range: of_descriptor(v[2], path); *size = v[4]; return "copy";
    case SYS_fallocate: of_descriptor(v[0], path); *size = v[3]; return "allocate";
    case SYS_fsync: case SYS_fdatasync: case SYS_sync_file_range: of_descriptor(v[0], path); return "fsync";
    case SYS_fchmod: of_descriptor(v[0], path); return "chmod";
    case SYS_fchown: of_descriptor(v[0], path); return "chown";
    case SYS_mmap: of_descriptor(v[4], path); *size = v[1]; return "map";
    default: return NULL;
    }
opened:
    if ((flags & O_ACCMODE) == O_RDONLY)
        return NULL;
    return flags & O_TRUNC ? "open, emptied" : "open";
}

static void stopped(int number, siginfo_t *information, void *context) {
    (void)number;
    ucontext_t *state = context;
#if defined(__x86_64__)
    greg_t *r = state->uc_mcontext.gregs;
    long v[6] = {r[REG_RDI], r[REG_RSI], r[REG_RDX], r[REG_R10], r[REG_R8], r[REG_R9]};
#else
    unsigned long long *r = state->uc_mcontext.regs;
    long v[6] = {r[0], r[1], r[2], r[3], r[4], r[5]};
#endif
    long call = information->si_syscall, size = 0, own = -1;
    char path[PATH_MAX] = "", other[PATH_MAX] = "", line[3 * PATH_MAX];
    const char *kind = described(call, v, path, other, &size);
    if (kind != NULL && (is_within(path) || is_within(other))) {
        own = atomic_fetch_add(&count, 1);
        if (own == victim && how == BEFORE)
            end();
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        int length = snprintf(line, sizeof line, "%ld\t%ld%09ld\t%s\t%s\t%s\t%ld\n", own, (long)now.tv_sec,
                              now.tv_nsec, kind, path, other, size);
        let_pass(SYS_write, log_file, (long)line, length, 0, 0, 0);
        if (own == victim && how == WITHIN && call == SYS_write)
            v[2] /= 2;
    }
    long result = let_pass(call, v[0], v[1], v[2], v[3], v[4], v[5]);
    if (own >= 0 && own == victim && how != NEVER)
        end();
#if defined(__x86_64__)
    r[REG_RAX] = result;
#else
    r[0] = result;
#endif
}

#define PUT(...) program[length++] = (struct sock_filter)__VA_ARGS__
#define LOAD(field) PUT(BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field)))
#define LOAD_AT(offset) PUT(BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offset))
#define PASS PUT(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW))
#define STOP PUT(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP))

/* From now on count under `path`, in `log`, and kill at operation `number`, from 0: before it, after it, or (a write) in
   the midst of it. 0, or an error's number where the kernel does not allow this. There may be one thread only. */
int operations_begin(const char *path, const char *log, long number, int kind) {
    log_file = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    victim = number;
    how = kind;
    snprintf(folder, sizeof folder, "%s", path);

    struct sigaction action = {.sa_sigaction = stopped, .sa_flags = SA_SIGINFO | SA_NODEFER};
    if (log_file < 0 || sigaction(SIGSYS, &action, NULL) != 0)
        return errno;

    struct sock_filter program[200];
    unsigned short length = 0;
    unsigned long from = (unsigned long)let_pass_begins, to = (unsigned long)let_pass_ends;
    LOAD(arch);
    PUT(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCHITECTURE, 1, 0));
    PASS;
    LOAD_AT(offsetof(struct seccomp_data, instruction_pointer) + 4); /* little-endian */
    PUT(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)(from >> 32), 0, 4));
    LOAD_AT(offsetof(struct seccomp_data, instruction_pointer));
    PUT(BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, (unsigned)from, 0, 2));
    PUT(BPF_JUMP(BPF_JMP | BPF_JGT | BPF_K, (unsigned)to, 1, 0));
    PASS;
    LOAD(nr);
    for (size_t n = 0; n < sizeof CALLS / sizeof *CALLS; n++) {
        PUT(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)CALLS[n], 0, 1));
        STOP;
    }
    /* A file that is mapped to be written can be changed without a call: the test refuses to count such a one. */
    PUT(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mmap, 0, 5));
    LOAD_AT(offsetof(struct seccomp_data, args[3]));
    PUT(BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, MAP_SHARED, 0, 3));
    LOAD_AT(offsetof(struct seccomp_data, args[2]));
    PUT(BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, PROT_WRITE, 0, 1));
    STOP;
    PASS;
    struct sock_fprog filter = {.len = length, .filter = program};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) != 0)
        return errno;
    return 0;
}
