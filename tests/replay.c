/* A step read from a file, run, and what it changed written back: how a step of another processor is tested.
 *
 * The file has an address, a size and the bytes of every piece of memory that a step reads or writes, the program and the
 * step first. Addresses in them are those of the process that wrote the file, and are put right here.
 */
#include <stdio.h>
#include <stdlib.h>

#include "step.h"

void lookahead_step(const Program *program, const Step *step, int kind);
int lookahead_able(void);

typedef struct {
    uint64_t address, size;
    char *here;
} Piece;

static Piece *pieces;
static uint64_t count;

static void *here(const void *there) {
    uint64_t address = (uint64_t)there;
    if (!address) return NULL;
    for (uint64_t i = 0; i < count; i++)
        if (address >= pieces[i].address && address < pieces[i].address + pieces[i].size)
            return pieces[i].here + (address - pieces[i].address);
    fprintf(stderr, "nothing at %llx\n", (unsigned long long)address);
    exit(3);
}

static void must(size_t done, size_t wanted) {
    if (done == wanted) return;
    fprintf(stderr, "the file ends early\n");
    exit(4);
}

#define HERE(field) ((field) = here((const void *)(field)))

int main(int arguments, char **argument) {
    if (arguments != 3) return 2;
    int kind = atoi(argument[2]), layers, tables;
    if (kind > lookahead_able()) return 5;
    FILE *file = fopen(argument[1], "r+b");
    if (!file) return 2;
    must(fread(&count, sizeof count, 1, file), 1);
    must(fread(&layers, sizeof layers, 1, file), 1);
    must(fread(&tables, sizeof tables, 1, file), 1);
    long start = ftell(file);
    pieces = calloc(count, sizeof *pieces);
    for (uint64_t i = 0; i < count; i++) {
        must(fread(&pieces[i].address, 16, 1, file), 1);
        pieces[i].here = aligned_alloc(64, (pieces[i].size + 8191) / 64 * 64);
        must(fread(pieces[i].here, 1, pieces[i].size, file), pieces[i].size);
    }
    Program program = *(Program *)pieces[0].here;
    Step step = *(Step *)pieces[1].here;
    Op *ops = here(program.ops);
    program.ops = ops;
    if (!tables) step.cosines = step.sines = NULL; /* of a model with learned positions */
    for (int i = 0; i < program.count; i++) HERE(ops[i].weight), HERE(ops[i].second), HERE(ops[i].bias);
    HERE(step.ids), HERE(step.angle), HERE(step.prefix), HERE(step.start), HERE(step.path), HERE(step.sequence);
    HERE(step.keep), HERE(step.keys), HERE(step.values), HERE(step.origin), HERE(step.by_sequence), HERE(step.by_head);
    HERE(step.cosines), HERE(step.sines), HERE(step.residual), HERE(step.heads), HERE(step.logits), HERE(step.scores);
    HERE(step.normed), HERE(step.attended), HERE(step.inner), HERE(step.partials), HERE(step.found), HERE(step.next);
    for (int i = 0; i < layers; i++) HERE(((void **)step.keys)[i]), HERE(((void **)step.values)[i]);
    for (int i = 0; i < tables; i++) HERE(((const void **)step.cosines)[i]), HERE(((const void **)step.sines)[i]);
    lookahead_step(&program, &step, kind);
    fseek(file, start, SEEK_SET);
    for (uint64_t i = 0; i < count; i++) {
        fwrite(&pieces[i].address, 16, 1, file);
        fwrite(pieces[i].here, 1, pieces[i].size, file);
    }
    return fclose(file) ? 2 : 0;
}
