// The kernels of the CPU. One source, compiled once per instruction set (hatch_build.py); the width of a
// vector follows from the compiler's target. No intrinsics and no fast-math: the vector extensions of GCC and
// Clang, and NaN stays NaN.
//
// assign_and_fit: rows in vector registers, their snapshots in the nearest cache. No row looks at its neighbour
// and every sum runs over the snapshots in order, so a row has the same bits in whatever block, tile or thread
// it is computed.
//
// A tile is 64 rows. Its snapshots are packed behind the pivot of their partial into a buffer that stays in
// the cache, the moments are taken on the way; then groups of up to 6 references sweep over the buffer with
// all their sums in registers, and leave their products. A fit takes the winners among those of its own set of
// references; all that comes before is done once, however many fits there are:
//
//     p_0   = w_0 + mean over 8 snapshots spread over T of (w - w_0)
//     x     = w - p_c                       c counts partials of 64 snapshots
//     d_m   = sum over c of <x, z_m> + (p_c - p_c-1) * (sum of z_m from partial c on)
//     p_c+1 = p_c + mean(x)                 the pivot follows the row
//
// class_sums: what the rows of a fit add up to, in the order and with the roundings of its definition.
//
// read_checked: files of elements and a CRC-32C, read straight into their place and checked while the cache
// still has them. Where the target has no instruction for that CRC it answers that it cannot.

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#if defined(__linux__) && __has_include(<linux/aio_abi.h>)
#define HAS_AIO 1
#include <linux/aio_abi.h>
#include <sys/syscall.h>
#else
#define HAS_AIO 0
#endif

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, VECTORS = 4;  // 32 registers: 4 x 6 sums, 4 rows, one factor
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, VECTORS = 2;  // 16 registers: 2 x 6 sums, 2 rows, one factor
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, VECTORS = 4;
#else
constexpr int VECTOR_BYTES = 16, VECTORS = 2;
#endif

#ifndef CMDGPU_SOURCE
#define CMDGPU_SOURCE ""  // digest of this file, by which a library that was built from another one is told
#endif

namespace {

constexpr int LANES = VECTOR_BYTES / 4;
constexpr int STRIP = VECTORS * LANES;  // rows whose sums are in registers at a time
constexpr int TILE = 64;                // rows
constexpr int LINE = 64;                // bytes of a cache line
constexpr int PARTIAL = 64;             // snapshots behind one pivot, as in limits.py
constexpr int64_t SPAN = 1024;          // snapshots in the buffer at a time: a quarter of a megabyte
constexpr float SMALLEST_SS = 0x1p-126f, LARGEST_SS = 3.40282347e38f;
constexpr int CONSTANT = -1, NOT_FINITE = -2;

typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Integers __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef float VectorAnywhere __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef uint16_t HalvesAnywhere __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));

struct Set {  // assignment.native_impl, field by field: the references of one fit, and where it goes
    const int32_t *product;         // of each distinct reference: its place among all that are multiplied
    const int32_t *index;           // the caller's number of it
    const float *mean, *rnorm_inv;  // of the raw reference
    int64_t references;             // distinct ones; where there is none the others still hold one value
    int16_t *mode;
    float *a, *b, *correlation, *margin;  // margin may be null
};

struct Arguments {  // assignment.native_impl, field by field
    const void *W;               // from row ``first`` on
    int64_t stride_t, stride_n;  // elements between snapshots, between rows
    int64_t snapshots, rows, first;
    const float *z;     // (groups, T, width)  references of all sets, centred, unit norm, padded with 0
    const float *tail;  // (groups, partials, width)  sums of z from each partial on
    int64_t groups, width;
    const Set *sets;
    int64_t fits;
    float *ss;       // the same for all of them
    float *scratch;  // cmdgpu_scratch_bytes, aligned to a cache line
    int64_t dtype;   // 0 float32, 1 float16, 2 bfloat16
};

inline Vector splat(float value) { return value - Vector{}; }
inline Integers all(int32_t value) { return value - Integers{}; }
inline Vector at(const float *place) { return *reinterpret_cast<const Vector *>(place); }
inline void put(float *place, Vector value) { *reinterpret_cast<Vector *>(place) = value; }

// ---- elements in storage -------------------------------------------------------------------------------

inline Words widen(const uint16_t *place) {
    Halves half = *reinterpret_cast<const HalvesAnywhere *>(place);
    return __builtin_convertvector(half, Words);
}

struct Float32 {
    typedef float Stored;
    static Vector load(const float *place) { return *reinterpret_cast<const VectorAnywhere *>(place); }
};

struct BFloat16 {
    typedef uint16_t Stored;
    static Vector load(const uint16_t *place) { return (Vector)(widen(place) << 16); }
};

struct Float16 {
    typedef uint16_t Stored;
    static Vector load(const uint16_t *place) {
        Words bits = widen(place), sign = (bits & 0x8000u) << 16, rest = (bits & 0x7FFFu) << 13;
        // The exponent moves from bias 15 to 127 by a product, which makes subnormals normal, too.
        Vector scaled = (Vector)rest * splat(0x1p112f);
        Words special = (Words)(rest >= (0x7C00u << 13)) & 0x7F800000u;  // inf and NaN keep their exponent
        return (Vector)((Words)scaled | special | sign);
    }
};

template <class Element>
float load_one(const typename Element::Stored *place) {
    typename Element::Stored padded[LANES] = {*place};
    return Element::load(padded)[0];
}

// ---- a tile --------------------------------------------------------------------------------------------

struct alignas(LINE) Tile {
    float pivot[TILE], step[TILE];  // the pivot, and what it moved by before this partial
    float mean[TILE], ss[TILE];     // the mean is counted from the pivot
    float centre[TILE], norm[TILE];
};

template <class Element>
struct Rows {  // the rows of a tile, of which ``live`` are there
    typedef typename Element::Stored Stored;
    const Stored *W;
    int64_t stride_t, stride_n, live;

    const Stored *place(int64_t t, int64_t i) const { return W + t * stride_t + i * stride_n; }
    bool time_major() const { return live == TILE && stride_n == 1; }
    float one(int64_t t, int64_t i) const { return i < live ? load_one<Element>(place(t, i)) : 0.0f; }
    Vector some(int64_t t, int64_t i) const {
        if (time_major()) return Element::load(place(t, i));
        Vector found{};
        for (int lane = 0; lane < LANES; lane++) found[lane] = one(t, i + lane);
        return found;
    }
};

// p_0, exact for a row that never moves, which the mean of 8 equal floats is not.
template <class Element>
void set_origin(const Rows<Element> &rows, int64_t snapshots, Tile &tile) {
    for (int i = 0; i < TILE; i += LANES) {
        Vector first = rows.some(0, i), total{};
        if (snapshots >= 8)
            for (int64_t k = 1; k < 8; k++) total += rows.some(k * snapshots / 8, i) - first;
        put(tile.pivot + i, first + total * splat(0.125f));
    }
}

struct Ahead {  // the next tile: its lines are asked for while this one is packed
    const char *place;
    int64_t stride;
    int lines;
    // Inlined by order: GCC takes a function that only asks for memory for one without effect, and drops its calls.
    __attribute__((always_inline)) void ask(int64_t t) const {
        for (int line = 0; line < lines; line++) __builtin_prefetch(place + t * stride + line * LINE, 0, 2);
    }
};

// x = w - p over a partial, its moments merged with those before it, and the next pivot.
template <class Load>
inline void add_partial(Load load, float *x, int64_t seen, int steps, const Ahead &ahead, Tile &tile) {
    const float share = float(double(steps) / double(seen + steps));
    const float weight = float(double(seen) * double(steps) / double(seen + steps));
    for (int i = 0; i < TILE; i += STRIP) {
        Vector pivot[VECTORS], s1[VECTORS], s2[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            pivot[v] = at(tile.pivot + i + v * LANES);
            s1[v] = s2[v] = Vector{};
        }
        for (int t = 0; t < steps; t++) {
            if (i == 0) ahead.ask(seen + t);
            for (int v = 0; v < VECTORS; v++) {
                Vector moved = load(t, i + v * LANES) - pivot[v];
                put(x + t * TILE + i + v * LANES, moved);
                s1[v] += moved;
                s2[v] += moved * moved;
            }
        }
        for (int v = 0; v < VECTORS; v++) {
            int j = i + v * LANES;
            Vector mean = s1[v] / splat(float(steps)), gap = mean - at(tile.mean + j);
            Vector next = pivot[v] + mean;
            // The step that is taken, which rounding makes another than the one that is meant.
            Vector step = next - pivot[v];
            put(tile.ss + j, at(tile.ss + j) + (s2[v] - s1[v] * mean) + gap * gap * splat(weight));
            put(tile.mean + j, at(tile.mean + j) + gap * splat(share) - step);
            put(tile.pivot + j, next);
            put(tile.step + j, step);
        }
    }
}

// ---- rows that are contiguous: turned in registers ------------------------------------------------------

template <int APART, size_t... LANE>
inline void exchange(Vector &a, Vector &b, std::index_sequence<LANE...>) {
#if defined(__clang__)
#define PICK(...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(...) __builtin_shuffle(a, b, Integers{__VA_ARGS__})
#endif
    Vector low = PICK(int(LANE & APART ? LANES + LANE - APART : LANE)...);
    b = PICK(int(LANE & APART ? LANES + LANE : LANE + APART)...);
#undef PICK
    a = low;
}

template <int APART>
inline void transpose(Vector (&square)[LANES]) {
    for (int i = 0; i < LANES; i++)
        if (!(i & APART)) exchange<APART>(square[i], square[i + APART], std::make_index_sequence<LANES>{});
    if constexpr (APART > 1) transpose<APART / 2>(square);
}

// ``steps`` snapshots from ``first`` on as numbers, (steps, TILE); rows that are not there are 0.
template <class Element>
void gather(const Rows<Element> &rows, int64_t first, int steps, float *x) {
    int t = 0;
    if (rows.live == TILE && rows.stride_t == 1)
        for (; t + LANES <= steps; t += LANES)
            for (int i = 0; i < TILE; i += LANES) {
                Vector square[LANES];
                for (int lane = 0; lane < LANES; lane++) square[lane] = Element::load(rows.place(first + t, i + lane));
                transpose<LANES / 2>(square);
                for (int lane = 0; lane < LANES; lane++) put(x + (t + lane) * TILE + i, square[lane]);
            }
    for (; t < steps; t++)
        for (int i = 0; i < TILE; i++) x[t * TILE + i] = rows.one(first + t, i);
}

// ---- references over a tile -----------------------------------------------------------------------------

struct Span {  // snapshots [first, first + count) of a tile, packed
    const float *x;      // (count, TILE)
    const float *steps;  // (partials, TILE)  what the pivot moved by before each
    int64_t first, count;
};

// One group of references over a span; ``products`` (WIDTH, TILE) carries d from span to span.
template <int WIDTH>
void sweep(const Span &span, const float *z, const float *tail, float *products) {
    for (int i = 0; i < TILE; i += STRIP) {
        Vector d[WIDTH][VECTORS];
        for (int m = 0; m < WIDTH; m++)
            for (int v = 0; v < VECTORS; v++)
                d[m][v] = span.first == 0 ? Vector{} : at(products + m * TILE + i + v * LANES);
        const float *x = span.x + i, *z_t = z;
        for (int64_t seen = 0, c = 0; seen < span.count; seen += PARTIAL, c++) {
            int64_t stop = seen + PARTIAL < span.count ? seen + PARTIAL : span.count;
            Vector sum[WIDTH][VECTORS] = {};
            for (int64_t t = seen; t < stop; t++, x += TILE, z_t += WIDTH) {
                for (int m = 0; m < WIDTH; m++) {
                    Vector factor = splat(z_t[m]);
                    for (int v = 0; v < VECTORS; v++) sum[m][v] += factor * at(x + v * LANES);
                }
            }
            const float *step = span.steps + c * TILE + i;
            for (int m = 0; m < WIDTH; m++)
                for (int v = 0; v < VECTORS; v++)
                    d[m][v] += sum[m][v] + at(step + v * LANES) * splat(tail[c * WIDTH + m]);
        }
        for (int m = 0; m < WIDTH; m++)
            for (int v = 0; v < VECTORS; v++) put(products + m * TILE + i + v * LANES, d[m][v]);
    }
}

typedef void (*Sweep)(const Span &, const float *, const float *, float *);
constexpr Sweep SWEEPS[] = {nullptr, sweep<1>, sweep<2>, sweep<3>, sweep<4>, sweep<5>, sweep<6>};

// ---- closing the fits -----------------------------------------------------------------------------------

// What every fit needs of a row: its mean, its norm, and an ss that is 0 when it never moves and NaN when it is
// not finite.
void settle(Tile &tile) {
    for (int i = 0; i < TILE; i++) {
        const float s = tile.ss[i];
        // NaN compares false, so a row that is not finite is neither within the limit nor moving.
        const bool finite = s <= LARGEST_SS, moving = finite & (s >= SMALLEST_SS);
        const float kept = moving ? s : 0.0f;
        tile.norm[i] = __builtin_sqrtf(moving ? s : 1.0f);
        tile.centre[i] = tile.pivot[i] + tile.mean[i];
        tile.ss[i] = finite ? kept : __builtin_nanf("");
    }
}

struct Winner {  // of as many rows as a vector has, and what its set says about it
    Vector size{}, second{}, d{}, mean, rnorm_inv;
    Integers index;
};

// Ascending and strictly greater: the lowest index wins a tie, and d = 0 never does.
inline void choose(const Set &set, const float *products, Winner (&winners)[VECTORS]) {
    for (Winner &best : winners)
        best.mean = splat(set.mean[0]), best.rnorm_inv = splat(set.rnorm_inv[0]), best.index = all(set.index[0]);
    for (int64_t m = 0; m < set.references; m++) {
        const float *product = products + set.product[m] * int64_t(TILE);
        for (int v = 0; v < VECTORS; v++) {
            Winner &best = winners[v];
            const Vector d = at(product + v * LANES), size = (Vector)((Integers)d & 0x7FFFFFFF);
            const Integers better = size > best.size;
            if (set.margin) {
                const Vector lower = better ? best.size : size;
                best.second = lower > best.second ? lower : best.second;
            }
            best.size = better ? size : best.size;
            best.d = better ? d : best.d;
            // A blend each: cheaper than to look up, lane by lane, what belongs to the winner.
            best.mean = better ? splat(set.mean[m]) : best.mean;
            best.rnorm_inv = better ? splat(set.rnorm_inv[m]) : best.rnorm_inv;
            best.index = better ? all(set.index[m]) : best.index;
        }
    }
}

template <class Number>
inline void copy(Number *to, const Number *from, int64_t live) {
    if (live == TILE) std::memcpy(to, from, TILE * sizeof *from);  // of a size known here: no call
    else std::memcpy(to, from, live * sizeof *from);
}

// All rows of the tile are computed; only the live ones are copied out.
void close_fit(const Set &set, const float *products, const Tile &tile, bool two, int64_t start, int64_t live) {
    alignas(LINE) float slope[TILE], offset[TILE], correlation[TILE], margin[TILE];
    alignas(LINE) int32_t index[TILE];
    alignas(LINE) int16_t mode[TILE];
    const Vector none{}, one = splat(1.0f);
    for (int i = 0; i < TILE; i += STRIP) {
        Winner winners[VECTORS];
        choose(set, products + i, winners);
        for (int v = 0; v < VECTORS; v++) {
            const int j = i + v * LANES;
            const Winner &best = winners[v];
            const Vector ss = at(tile.ss + j), norm = at(tile.norm + j);
            const Integers finite = ss == ss, moving = ss > none;
            Vector c = best.d / norm;
            c = c > one ? one : c;
            c = c < -one ? -one : c;
            // Two snapshots correlate perfectly with anything that moves; rounding has no say.
            if (two) c = best.d < none ? -one : best.d > none ? one : none;
            const Vector a = moving ? best.d * best.rnorm_inv : none;
            const Vector b = at(tile.centre + j) - a * best.mean;
            put(slope + j, a);
            put(offset + j, finite ? b : splat(__builtin_nanf("")));
            put(correlation + j, moving ? c : none);
            if (set.margin) put(margin + j, moving ? (best.size - best.second) / norm : none);
            const Integers found = moving ? best.index : all(CONSTANT);
            *reinterpret_cast<Integers *>(index + j) = finite ? found : all(NOT_FINITE);
        }
    }
    for (int i = 0; i < TILE; i++) mode[i] = int16_t(index[i]);
    copy(set.mode + start, mode, live);
    copy(set.a + start, slope, live);
    copy(set.b + start, offset, live);
    copy(set.correlation + start, correlation, live);
    if (set.margin) copy(set.margin + start, margin, live);
}

template <class Element>
void fit_tile(const Arguments &arg, int64_t start) {
    typedef typename Element::Stored Stored;
    const int64_t left = arg.rows - start, live = left < TILE ? left : TILE;
    const Stored *W = static_cast<const Stored *>(arg.W) + (start - arg.first) * arg.stride_n;
    const Rows<Element> rows{W, arg.stride_t, arg.stride_n, live};
    float *x = arg.scratch, *steps = x + SPAN * TILE, *products = steps + SPAN / PARTIAL * TILE;
    const int64_t partials = (arg.snapshots + PARTIAL - 1) / PARTIAL;
    const bool more = rows.time_major() && left >= 2 * TILE;
    const Ahead next{reinterpret_cast<const char *>(rows.place(0, TILE)), arg.stride_t * int64_t(sizeof(Stored)),
                     more ? TILE * int(sizeof(Stored)) / LINE : 0};
    Tile tile{};
    set_origin(rows, arg.snapshots, tile);
    for (int64_t first = 0; first < arg.snapshots; first += SPAN) {
        const int64_t count = arg.snapshots - first < SPAN ? arg.snapshots - first : SPAN;
        for (int64_t seen = 0; seen < count; seen += PARTIAL) {
            const int many = count - seen < PARTIAL ? int(count - seen) : PARTIAL;
            float *here = x + seen * TILE;
            std::memcpy(steps + seen / PARTIAL * TILE, tile.step, sizeof tile.step);
            if (rows.time_major()) {
                const Stored *from = rows.place(first + seen, 0);
                auto load = [=](int64_t t, int i) { return Element::load(from + t * arg.stride_t + i); };
                add_partial(load, here, first + seen, many, next, tile);
            } else {
                gather(rows, first + seen, many, here);
                auto load = [=](int64_t t, int i) { return at(here + t * TILE + i); };
                add_partial(load, here, first + seen, many, next, tile);
            }
        }
        const Span span{x, steps, first, count};
        for (int64_t group = 0; group < arg.groups; group++)
            SWEEPS[arg.width](span, arg.z + (group * arg.snapshots + first) * arg.width,
                              arg.tail + (group * partials + first / PARTIAL) * arg.width,
                              products + group * arg.width * TILE);
    }
    settle(tile);
    copy(arg.ss + start, tile.ss, live);
    for (int64_t i = 0; i < arg.fits; i++)
        close_fit(arg.sets[i], products, tile, arg.snapshots == 2, start, live);
}

template <class Element>
void fit(const Arguments &arg, int64_t start, int64_t stop) {
    for (; start < stop; start += TILE) fit_tile<Element>(arg, start);
}

// ---- class_sums -----------------------------------------------------------------------------------------

constexpr int FIELDS = 6, FIRST_MODE = 2, N_BINS = 256;
constexpr int64_t GRANULE = 1 << 14;

typedef double Sums __attribute__((vector_size(LINE)));

struct SumArguments {  // class_sums.native_impl, field by field
    const int16_t *mode;
    const float *a, *b, *correlation, *ss;
    int64_t rows;
    const double *means;  // of the references; one 0 when there are none
    int64_t classes;      // non-finite, constant, then the modes
    double snapshots, epsilon4;
    double *sums;        // (FIELDS, classes)
    int64_t *histogram;  // (classes - FIRST_MODE, N_BINS), or null
    Sums *scratch;       // (classes,)
};

// Rounded after every product, as NumPy does: a fused one would round once and give other bits.
#if defined(__clang__)
#define EVERY_ROUNDING
#else
#define EVERY_ROUNDING __attribute__((optimize("fp-contract=off")))
#endif

EVERY_ROUNDING void add_classes(const SumArguments &arg) {
#if defined(__clang__)
#pragma clang fp contract(off)
#endif
    for (int64_t start = 0; start < arg.rows; start += GRANULE) {
        const int64_t stop = start + GRANULE < arg.rows ? start + GRANULE : arg.rows;
        std::memset(arg.scratch, 0, arg.classes * sizeof(Sums));
        for (int64_t i = start; i < stop; i++) {
            const int64_t mode = arg.mode[i], at = mode + FIRST_MODE;
            const double size = std::fabs(double(arg.correlation[i])), size2 = size * size;
            const double energy = at == 0 ? 0.0 : double(arg.ss[i]);
            const double mean = double(arg.b[i]) + double(arg.a[i]) * arg.means[mode < 0 ? 0 : mode];
            const double grain = arg.epsilon4 * mean;
            const bool below = mode >= 0 && energy <= arg.snapshots * (grain * grain);
            arg.scratch[at] += Sums{1.0, energy, energy * (1.0 - size2), size, size2, below ? 1.0 : 0.0};
            if (arg.histogram && mode >= 0) {
                const int bin = int(N_BINS * (1.0 - std::sqrt(1.0 - size)));
                arg.histogram[mode * N_BINS + (bin < N_BINS ? bin : N_BINS - 1)]++;
            }
        }
        for (int field = 0; field < FIELDS; field++)
            for (int64_t at = 0; at < arg.classes; at++) arg.sums[field * arg.classes + at] += arg.scratch[at][field];
    }
}

// ---- read_checked ---------------------------------------------------------------------------------------

struct Files {  // native.files, field by field
    const char *directory, *names;  // one name after the other, each with its NUL
    int64_t files, bytes;           // bytes of elements in every file; the CRC follows them
    char *const *places;
    const uint32_t *kept;  // the CRC each file must carry, and its elements must have
    uint32_t *tails;       // what each was found to carry
    int64_t *answers;      // 0 where all is right
};

struct Pieces {  // assignment.from_files, field by field
    Files files;         // one per snapshot
    const char *coming;  // names of the files that this thread will ask for next, or null
    int64_t past_cache;  // whether files that are not in the page cache shall not get there
    int64_t rows;        // of one piece; past the cache whole blocks of the disk
    char *buffer;        // (snapshots, stride) bytes; past the cache two of these, on a block's edge, a block too long
    int64_t stride;
    int32_t *open;       // (2, snapshots): descriptors, and which of them have given what is looked at
    uint32_t *crcs;      // (snapshots,)
};

enum Answer : int64_t { RIGHT = 0, WRONG = 1, CANNOT = 2 };

// A regular file of the right size in this very directory, or -1.
int open_file(int directory, const char *name, int64_t bytes) {
    const int fd = openat(directory, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    struct stat status;
    if (fd < 0) return -1;
    if (fstat(fd, &status) == 0 && S_ISREG(status.st_mode) && status.st_size == bytes + 4) return fd;
    close(fd);
    return -1;
}

template <class Look>
void for_each_file(const Files &arg, Look look) {
    const int directory = open(arg.directory, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    const char *name = arg.names;
    for (int64_t i = 0; i < arg.files; i++, name += std::strlen(name) + 1) {
        const int fd = directory < 0 ? -1 : open_file(directory, name, arg.bytes);
        arg.answers[i] = fd >= 0 && look(fd, i) ? RIGHT : WRONG;
        if (fd >= 0) close(fd);
    }
    if (directory >= 0) close(directory);
}

#if defined(__SSE4_2__) || defined(__ARM_FEATURE_CRC32)
#define HAS_CRC32C 1

#if defined(__SSE4_2__)
inline uint64_t step(uint64_t crc, uint64_t word) { return __builtin_ia32_crc32di(crc, word); }
inline uint64_t step(uint64_t crc, uint8_t byte) { return __builtin_ia32_crc32qi(uint32_t(crc), byte); }
#else
inline uint64_t step(uint64_t crc, uint64_t word) { return __builtin_aarch64_crc32cx(uint32_t(crc), word); }
inline uint64_t step(uint64_t crc, uint8_t byte) { return __builtin_aarch64_crc32cb(uint32_t(crc), byte); }
#endif

inline uint64_t word_at(const char *place) {
    uint64_t word;
    std::memcpy(&word, place, 8);
    return word;
}

constexpr int64_t STREAM = 4096;  // bytes of one of three streams: one alone waits for itself at every step

// What a CRC becomes over STREAM zero bytes. It is linear, so the 32 single bits tell it all.
struct Shift {
    uint32_t table[4][256] = {};
    Shift() {
        for (int bit = 0; bit < 32; bit++) {
            uint64_t crc = uint64_t(1) << bit;
            for (int64_t i = 0; i < STREAM; i += 8) crc = step(crc, uint64_t(0));
            for (int byte = 0; byte < 256; byte++)
                if (byte >> (bit % 8) & 1) table[bit / 8][byte] ^= uint32_t(crc);
        }
    }
    uint64_t operator()(uint64_t crc) const {
        return table[0][crc & 255] ^ table[1][crc >> 8 & 255] ^ table[2][crc >> 16 & 255] ^ table[3][crc >> 24 & 255];
    }
};

// The CRC-32C of ``crc``'s bytes and these; begins and ends inverted, as the files carry it.
uint32_t crc32c(uint32_t begun, const char *place, int64_t bytes) {
    static const Shift shift;
    uint64_t crc = ~begun;
    for (; bytes >= 3 * STREAM; place += 3 * STREAM, bytes -= 3 * STREAM) {
        uint64_t second = 0, third = 0;
        for (int64_t i = 0; i < STREAM; i += 8) {
            crc = step(crc, word_at(place + i));
            second = step(second, word_at(place + STREAM + i));
            third = step(third, word_at(place + 2 * STREAM + i));
        }
        crc = shift(shift(crc) ^ second) ^ third;
    }
    for (; bytes >= 8; place += 8, bytes -= 8) crc = step(crc, word_at(place));
    for (; bytes > 0; place++, bytes--) crc = step(crc, uint8_t(*place));
    return ~uint32_t(crc);
}

constexpr int64_t BLOCK = 4096;  // of a disk: what is read past the page cache begins and ends at a multiple

// ``bytes`` from ``offset`` on; past the cache whole blocks are asked for, the last of which the file may not fill.
bool read_all(int fd, char *place, int64_t bytes, int64_t offset, bool past_cache = false) {
    while (bytes > 0) {
        const int64_t asked = past_cache ? (bytes + BLOCK - 1) / BLOCK * BLOCK : bytes;
        const ssize_t got = pread(fd, place, asked, offset);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0 && errno == EINVAL && past_cache) {  // a disk with wishes of its own
            past_cache = false;
            if (fcntl(fd, F_SETFL, 0) == 0) continue;
        }
        if (got <= 0) return false;
        place += got, bytes -= got, offset += got;
    }
    return true;
}

constexpr int64_t PIECE = 256 << 10;  // bytes read at a time: still in the cache when their CRC is taken

bool read_file(int fd, char *place, int64_t bytes, uint32_t kept) {
    uint32_t crc = 0, carried;
    for (int64_t done = 0; done < bytes; done += PIECE) {
        const int64_t here = bytes - done < PIECE ? bytes - done : PIECE;
        if (!read_all(fd, place + done, here, done)) return false;
        crc = crc32c(crc, place + done, here);
    }
    return read_all(fd, reinterpret_cast<char *>(&carried), 4, bytes) && carried == kept && crc == kept;
}

// ---- fit_files: read_checked and assign_and_fit in one ----------------------------------------------------

// Whether the file's first byte is in memory. mincore fetches nothing, but of what it may not tell it says "yes".
bool is_warm(int fd) {
#if defined(RWF_NOWAIT)
    void *const page = mmap(nullptr, 1, PROT_READ, MAP_SHARED, fd, 0);
    if (page != MAP_FAILED) {
        unsigned char held = 1;
        const bool cold = mincore(page, 1, &held) == 0 && !(held & 1);
        munmap(page, 1);
        if (cold) return false;
    }
    char byte;
    iovec one{&byte, 1};
    return preadv2(fd, &one, 1, 0, RWF_NOWAIT) >= 0 || errno != EAGAIN;
#else
    (void)fd;
    return true;
#endif
}

// The disk is asked for the whole file.
void announce(int fd, int64_t bytes) {
#if defined(POSIX_FADV_WILLNEED)
    posix_fadvise(fd, 0, bytes + 4, POSIX_FADV_WILLNEED);
#else
    (void)fd, (void)bytes;
#endif
}

// What is read from here on goes straight to its place.
bool leave_cache(int fd) {
#if defined(O_DIRECT)
    return fcntl(fd, F_SETFL, O_DIRECT) == 0;
#else
    (void)fd;
    return false;
#endif
}

// Reads past the cache that are under way: one of every file at once, because a disk gives its rate to who asks
// for much at a time. Where the kernel takes no such requests nothing arrives, and the files are read in turn.
class UnderWay {
  public:
    UnderWay() = default;
    UnderWay(const UnderWay &) = delete;
    UnderWay &operator=(const UnderWay &) = delete;

#if HAS_AIO
    ~UnderWay() { close(); }

    void begin(const int32_t *files, int64_t count, char *place, int64_t stride, int64_t bytes, int64_t offset) {
        if (!has_room(count)) return;
        for (int64_t t = 0; t < count; t++) {
            requests[t] = iocb{};
            requests[t].aio_lio_opcode = IOCB_CMD_PREAD;
            requests[t].aio_fildes = uint32_t(files[t]);
            requests[t].aio_buf = uint64_t(place + t * stride);
            requests[t].aio_nbytes = uint64_t((bytes + BLOCK - 1) / BLOCK * BLOCK);
            requests[t].aio_offset = offset;
            requests[t].aio_data = uint64_t(t);
            list[t] = &requests[t];
        }
        while (asked < count) {
            const long taken = syscall(SYS_io_submit, context, long(count - asked), list + asked);
            if (taken > 0) asked += taken;
            else if (taken == 0 || errno != EINTR) break;
        }
    }

    // Waits for all of them; ``bytes`` says how many have come of file t, not more than were asked for.
    template <class Arrived>
    void end(Arrived arrived) {
        while (asked > 0) {
            const long came = syscall(SYS_io_getevents, context, 1L, long(asked), events, nullptr);
            if (came < 0 && errno != EINTR) std::abort();  // the buffer is the kernel's, and it will not give it back
            for (long i = 0; i < came; i++) arrived(int64_t(events[i].data), int64_t(events[i].res));
            asked -= came > 0 ? came : 0;
        }
    }

  private:
    aio_context_t context = 0;  // kept from unit to unit: to end one takes milliseconds
    int64_t room = 0, asked = 0;
    iocb *requests = nullptr, **list = nullptr;
    io_event *events = nullptr;

    bool has_room(int64_t count) {
        if (room >= count) return true;
        close();
        requests = static_cast<iocb *>(std::malloc(count * sizeof *requests));
        list = static_cast<iocb **>(std::malloc(count * sizeof *list));
        events = static_cast<io_event *>(std::malloc(count * sizeof *events));
        if (requests && list && events && syscall(SYS_io_setup, long(count), &context) == 0) room = count;
        return room >= count;
    }

    void close() {
        if (room) syscall(SYS_io_destroy, context);
        std::free(requests), std::free(list), std::free(events);
        requests = nullptr, list = nullptr, events = nullptr, context = 0, room = 0;
    }
#else
    void begin(const int32_t *, int64_t, char *, int64_t, int64_t, int64_t) {}
    template <class Arrived>
    void end(Arrived) {}
#endif
};

// The pieces of files, one after the other; past the cache the next one is under way meanwhile.
class Reading {
  public:
    Reading(const Pieces &pieces, int64_t size, int64_t snapshots, bool past_cache)
        : pieces(pieces), size(size), snapshots(snapshots), past_cache(past_cache) {
        if (past_cache) ask(0);
    }
    ~Reading() { under_way().end([](int64_t, int64_t) {}); }
    Reading(const Reading &) = delete;
    Reading &operator=(const Reading &) = delete;

    // The rows from ``first`` on, checked as far as they go, or null.
    char *piece(int64_t first) {
        char *const buffer = place(first);
        for (int64_t t = 0; t < snapshots; t++) pieces.open[snapshots + t] = false;
        const int64_t bytes = wanted(first);
        under_way().end([=](int64_t t, int64_t got) { pieces.open[snapshots + t] = got >= bytes; });
        if (past_cache) ask(first + pieces.rows);
        for (int64_t t = 0; t < snapshots; t++) {
            char *const values = buffer + t * pieces.stride;
            const bool came = pieces.open[snapshots + t];
            if (!came && !read_all(pieces.open[t], values, bytes, first * size, past_cache)) return nullptr;
            const int64_t elements = bytes - (is_last(first) ? 4 : 0);
            pieces.crcs[t] = crc32c(pieces.crcs[t], values, elements);
            if (!is_last(first)) continue;
            uint32_t carried;
            std::memcpy(&carried, values + elements, 4);
            if (carried != pieces.files.kept[t] || pieces.crcs[t] != carried) return nullptr;
        }
        return buffer;
    }

    int64_t rows() const { return pieces.files.bytes / size; }

  private:
    const Pieces &pieces;
    const int64_t size, snapshots;
    const bool past_cache;

    static UnderWay &under_way() {
        static thread_local UnderWay own;
        return own;
    }
    bool is_last(int64_t first) const { return first + pieces.rows >= rows(); }
    // of a piece, and with the last one the CRC
    int64_t wanted(int64_t first) const {
        return is_last(first) ? pieces.files.bytes - first * size + 4 : pieces.rows * size;
    }
    char *place(int64_t first) const {
        const int64_t one = (snapshots * pieces.stride + BLOCK - 1) / BLOCK * BLOCK;
        return pieces.buffer + (past_cache && first / pieces.rows % 2 ? one : 0);
    }
    void ask(int64_t first) {
        if (first >= rows()) return;
        under_way().begin(pieces.open, snapshots, place(first), pieces.stride, wanted(first), first * size);
    }
};

// A few rows of every snapshot at a time, which the cache still has when they are fitted: the memory sees each
// byte once. The CRCs are known at the end only; the outputs are nothing to rely on unless the answer is true.
template <class Element>
bool fit_pieces(const Arguments &arg, const Pieces &pieces, bool past_cache) {
    constexpr int64_t SIZE = sizeof(typename Element::Stored);
    Reading reading(pieces, SIZE, arg.snapshots, past_cache);
    for (int64_t first = 0; first < reading.rows(); first += pieces.rows) {
        const char *const values = reading.piece(first);
        if (!values) return false;
        const int64_t stop = first + pieces.rows < arg.rows ? first + pieces.rows : arg.rows;
        if (stop <= first) continue;
        Arguments part = arg;
        part.W = values;
        part.stride_t = pieces.stride / SIZE;
        part.stride_n = 1;
        part.rows = stop;
        part.first = first;
        fit<Element>(part, first, stop);
    }
    return true;
}

bool fit_files(const Arguments &arg, const Pieces &pieces) {
    const int directory = open(pieces.files.directory, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    const char *name = pieces.files.names;
    bool right = directory >= 0, warm = true;
    int64_t opened = 0;
    for (; right && opened < arg.snapshots; name += std::strlen(name) + 1) {
        const int fd = open_file(directory, name, pieces.files.bytes);
        right = fd >= 0;
        if (right) pieces.open[opened++] = fd, warm &= is_warm(fd);
    }
    bool past_cache = pieces.past_cache && !warm;
    if (right && !warm)
        for (int64_t t = 0; t < opened; t++) {
            past_cache = past_cache && leave_cache(pieces.open[t]);
            if (!past_cache) announce(pieces.open[t], pieces.files.bytes);
        }
    if (right && !warm && !past_cache && pieces.coming) {
        name = pieces.coming;
        for (int64_t t = 0; t < arg.snapshots; t++, name += std::strlen(name) + 1) {
            const int fd = open_file(directory, name, pieces.files.bytes);
            if (fd >= 0) announce(fd, pieces.files.bytes), close(fd);
        }
    }
    if (right) switch (arg.dtype) {
        case 0: right = fit_pieces<Float32>(arg, pieces, past_cache); break;
        case 1: right = fit_pieces<Float16>(arg, pieces, past_cache); break;
        case 2: right = fit_pieces<BFloat16>(arg, pieces, past_cache); break;
    }
    for (int64_t t = 0; t < opened; t++) close(pieces.open[t]);
    if (directory >= 0) close(directory);
    return right;
}

#else
#define HAS_CRC32C 0
#endif

}  // namespace

extern "C" {

const char *cmdgpu_source() { return CMDGPU_SOURCE; }

// What one thread needs beside W and the outputs; ``references`` counts the padding of the groups, too.
int64_t cmdgpu_scratch_bytes(int64_t references) {
    return int64_t(sizeof(float)) * TILE * (SPAN + SPAN / PARTIAL + references);
}

// Fit the rows [start, stop); start is a multiple of the tile.
void cmdgpu_assign_and_fit(const Arguments *arg, int64_t start, int64_t stop) {
    switch (arg->dtype) {
        case 0: return fit<Float32>(*arg, start, stop);
        case 1: return fit<Float16>(*arg, start, stop);
        case 2: return fit<BFloat16>(*arg, start, stop);
    }
}

void cmdgpu_class_sums(const SumArguments *arg) { add_classes(*arg); }

int64_t cmdgpu_can_read() { return HAS_CRC32C; }

// Every file into its place; ``answers`` says which are not what they must be.
void cmdgpu_read_checked(const Files *arg) {
#if HAS_CRC32C
    for_each_file(*arg, [=](int fd, int64_t i) { return read_file(fd, arg->places[i], arg->bytes, arg->kept[i]); });
#else
    for (int64_t i = 0; i < arg->files; i++) arg->answers[i] = CANNOT;
#endif
}

// Fit the rows of whole files, one per snapshot; false when one of them is not what it must be.
int64_t cmdgpu_fit_files(const Arguments *arg, const Pieces *pieces) {
#if HAS_CRC32C
    return fit_files(*arg, *pieces);
#else
    (void)arg, (void)pieces;
    return false;
#endif
}

// The CRC every file carries; its elements are not looked at.
void cmdgpu_read_tails(const Files *arg) {
    for_each_file(*arg, [=](int fd, int64_t i) { return pread(fd, arg->tails + i, 4, arg->bytes) == 4; });
}

}  // extern "C"
