/* An audit library (rtld-audit(7)) that makes other libraries believe that this processor ends at AVX2.
 *
 * A program that asks the processor what it can do executes CPUID and XGETBV. So each such instruction is replaced in
 * memory, as soon as its library is loaded, by two bytes that no processor knows. The signal that follows, SIGILL, is
 * answered here with the instruction's true result, without what is newer than AVX2. A program that handles SIGILL
 * itself, as Python's faulthandler does, takes that answer away.
 *
 * The file MASK_SITES lists the instructions: a library's path, then lines "c OFFSET" (CPUID) or "x OFFSET" (XGETBV),
 * where an offset is the hexadecimal virtual address within the library (lab/avx2/sites.py writes it).
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <link.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

/* Undefined opcodes of two bytes; CPUID has two bytes too, XGETBV has three. */
static const uint8_t CPUID_MARK[2] = {0x0F, 0x04}, XGETBV_MARK[3] = {0x0F, 0x0A, 0x90};
static const uint8_t CPUID[2] = {0x0F, 0xA2}, XGETBV[3] = {0x0F, 0x01, 0xD0};

/* Registers of CPUID leaf 7 by bit: AVX-512 F, DQ, IFMA, PF, ER, CD, BW, VL; */
#define EBX_7_0 (1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31)
/* VBMI, VBMI2, GFNI, VAES, VPCLMULQDQ, VNNI, BITALG, VPOPCNTDQ; */
#define ECX_7_0 (1u << 1 | 1u << 6 | 1u << 8 | 1u << 9 | 1u << 10 | 1u << 11 | 1u << 12 | 1u << 14)
/* 4VNNIW, 4FMAPS, VP2INTERSECT, AMX-BF16, AVX-512 FP16, AMX-TILE, AMX-INT8; */
#define EDX_7_0 (1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25)
/* SHA512, SM3, SM4, AVX-VNNI, AVX-512 BF16, AMX-FP16, AVX-IFMA, MOVRS; */
#define EAX_7_1 (7u | 1u << 4 | 1u << 5 | 1u << 21 | 1u << 23 | 1u << 31)
/* AVX-VNNI-INT8, AVX-NE-CONVERT, AMX-COMPLEX, AVX-VNNI-INT16, AVX10, APX. */
#define EDX_7_1 (1u << 4 | 1u << 5 | 1u << 8 | 1u << 10 | 1u << 19 | 1u << 21)
/* The states of x87, SSE and AVX in XCR0. */
#define XCR0 7u

static void answer(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *code = (const uint8_t *)registers[REG_RIP];
    if (info->si_code <= 0) { /* sent by a process, not by the processor */
        signal(number, SIG_DFL);
        raise(number);
    } else if (memcmp(code, CPUID_MARK, sizeof CPUID_MARK) == 0) {
        uint32_t leaf = registers[REG_RAX], sub = registers[REG_RCX], a, b, c, d;
        __cpuid_count(leaf, sub, a, b, c, d);
        if (leaf == 7 && sub == 0) b &= ~EBX_7_0, c &= ~ECX_7_0, d &= ~EDX_7_0;
        if (leaf == 7 && sub == 1) a &= ~EAX_7_1, d &= ~EDX_7_1;
        if (leaf == 0xD && sub == 0) a &= XCR0;
        if (leaf == 0x1D || leaf == 0x1E || leaf == 0x24) a = b = c = d = 0; /* AMX, AVX10 */
        registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
        registers[REG_RIP] += sizeof CPUID_MARK;
    } else if (memcmp(code, XGETBV_MARK, sizeof XGETBV_MARK) == 0) {
        uint32_t low, high;
        __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"((uint32_t)registers[REG_RCX]));
        registers[REG_RAX] = low & XCR0, registers[REG_RDX] = 0;
        registers[REG_RIP] += sizeof XGETBV_MARK;
    } else {
        signal(number, SIG_DFL); /* an illegal instruction of the program's own: it ends with that */
    }
}

static void replace(uint8_t *place, const uint8_t *expected, const uint8_t *mark, size_t size, const char *name) {
    if (memcmp(place, expected, size) != 0) {
        fprintf(stderr, "mask: %s has changed since its instructions were listed\n", name);
        _exit(3);
    }
    long page = sysconf(_SC_PAGESIZE);
    uint8_t *start = (uint8_t *)((uintptr_t)place & -page);
    size_t length = place + size - start;
    if (mprotect(start, length, PROT_READ | PROT_WRITE | PROT_EXEC) != 0) {
        perror("mask: mprotect");
        _exit(3);
    }
    memcpy(place, mark, size);
    if (mprotect(start, length, PROT_READ | PROT_EXEC) != 0) {
        perror("mask: mprotect");
        _exit(3);
    }
}

unsigned int la_version(unsigned int version) {
    struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGILL, &action, NULL);
    return version;
}

unsigned int la_objopen(struct link_map *map, Lmid_t space, uintptr_t *cookie) {
    const char *list = getenv("MASK_SITES");
    char real[4096], line[4200];
    if (list == NULL || map->l_name[0] == '\0' || realpath(map->l_name, real) == NULL) return 0;
    FILE *file = fopen(list, "r");
    if (file == NULL) {
        perror("mask: MASK_SITES");
        _exit(3);
    }
    int here = 0;
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = '\0';
        if (line[0] == '/') {
            here = strcmp(line, real) == 0;
        } else if (here) {
            uint8_t *place = (uint8_t *)map->l_addr + strtoull(line + 2, NULL, 16);
            if (line[0] == 'c') replace(place, CPUID, CPUID_MARK, sizeof CPUID, real);
            else replace(place, XGETBV, XGETBV_MARK, sizeof XGETBV, real);
        }
    }
    fclose(file);
    return 0;
}
