/*
 * Writes to raw disks in the guest in ways that a reader can check afterwards.
 *
 *   load pairs DISK1 DISK2 THREADS
 *       Each thread counts up: it writes a number to its slot of DISK1, waits until the
 *       write is complete, then writes the same number to its slot of DISK2.
 *   load scatter DISK FIRST SLOTS
 *       Writes 1 to 16 slots at random places of SLOTS slots from FIRST on, one request
 *       at a time, each slot stamped; 256 requests near one another, then elsewhere. At
 *       the end reads all back and compares.
 *
 * A slot is 4 KiB. Both go on until /tmp/stop exists. /tmp/progress holds the number of
 * writes that are complete.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SLOT = 4096, WORDS = SLOT / 8, MOST = 16, NEAR = 128 };

static int disks[2];
static atomic_ulong written;
static atomic_bool stopping;

/* Ends the program with the place and the reason. */
static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static int open_disk(const char *path)
{
    int disk = open(path, O_RDWR | O_DIRECT);
    if (disk < 0)
        fail(path);
    return disk;
}

static uint64_t *aligned(size_t bytes)
{
    void *memory;
    if (posix_memalign(&memory, SLOT, bytes))
        fail("memory");
    memset(memory, 0, bytes);
    return memory;
}

/* Writes whole slots; a write that fails or falls short ends the program. */
static void put(int disk, const uint64_t *data, uint64_t slot, size_t slots)
{
    if (pwrite(disk, data, slots * SLOT, slot * SLOT) != (ssize_t)(slots * SLOT))
        fail("write");
    written++;
}

/* Makes the content of a slot that was last written by write `number`. */
static void stamp(uint64_t *data, uint64_t slot, uint64_t number)
{
    for (int word = 0; word < WORDS; word += 2) {
        data[word] = slot;
        data[word + 1] = number;
    }
}

/* Keeps /tmp/progress up to date until /tmp/stop exists. */
static void *watch(void *unused)
{
    while (access("/tmp/stop", F_OK) != 0) {
        FILE *progress = fopen("/tmp/progress.new", "w");
        fprintf(progress, "%lu\n", (unsigned long)written);
        fclose(progress);
        rename("/tmp/progress.new", "/tmp/progress");
        usleep(50000);
    }
    stopping = 1;
    return unused;
}

static void *pairs(void *slot)
{
    uint64_t *data = aligned(SLOT);
    for (uint64_t number = 1; !stopping; number++) {
        stamp(data, (uintptr_t)slot, number);
        put(disks[0], data, (uintptr_t)slot, 1);
        put(disks[1], data, (uintptr_t)slot, 1);
    }
    return NULL;
}

static void scatter(uint64_t first, uint64_t slots)
{
    uint64_t *data = aligned(MOST * SLOT), *last = calloc(slots, sizeof *last);
    uint64_t number = 0, wrong = 0, place = 0;

    while (!stopping) {
        if (number++ % 256 == 0)
            place = random() % (slots - NEAR - MOST);
        uint64_t count = 1 + random() % MOST, at = place + random() % NEAR;
        for (uint64_t slot = at; slot < at + count; slot++) {
            stamp(data + (slot - at) * WORDS, first + slot, number);
            last[slot] = number;
        }
        put(disks[0], data, first + at, count);
    }
    for (uint64_t slot = 0; slot < slots; slot++) {
        if (last[slot] == 0)
            continue;
        if (pread(disks[0], data, SLOT, (first + slot) * SLOT) != SLOT)
            fail("read");
        stamp(data + WORDS, first + slot, last[slot]);
        if (memcmp(data, data + WORDS, SLOT) != 0 && wrong++ < 5)
            printf("slot %lu: write %lu of slot %lu, not write %lu\n", first + slot,
                   data[1], data[0], last[slot]);
    }
    printf("%lu writes, %lu slots wrong\n", number, wrong);
    exit(wrong != 0);
}

int main(int argc, char **argv)
{
    pthread_t watcher;

    if (pthread_create(&watcher, NULL, watch, NULL))
        fail("thread");
    if (argc == 5 && strcmp(argv[1], "pairs") == 0) {
        long threads = atol(argv[4]);
        pthread_t *thread = calloc(threads, sizeof *thread);
        disks[0] = open_disk(argv[2]);
        disks[1] = open_disk(argv[3]);
        for (long slot = 0; slot < threads; slot++)
            if (pthread_create(&thread[slot], NULL, pairs, (void *)slot))
                fail("thread");
        for (long slot = 0; slot < threads; slot++)
            pthread_join(thread[slot], NULL);
        printf("%lu writes\n", (unsigned long)written);
        return 0;
    }
    if (argc == 5 && strcmp(argv[1], "scatter") == 0) {
        disks[0] = open_disk(argv[2]);
        scatter(atol(argv[3]), atol(argv[4]));
    }
    fprintf(stderr, "usage: load pairs DISK1 DISK2 THREADS | load scatter DISK FIRST SLOTS\n");
    return 2;
}
