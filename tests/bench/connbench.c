/* A client and a server that do nothing but make connections: connect, one byte each way, close.
 *
 *   connbench server PORT
 *   connbench client ADDRESS PORT AT_ONCE SECONDS
 *   connbench requests ADDRESS PORT AT_ONCE SECONDS
 *
 * One thread, epoll, IPv4 and IPv6. The client keeps AT_ONCE connections under way for SECONDS and prints one JSON
 * object: finished connections, errors, seconds, and latency in microseconds to the end of connect(2) and to the
 * echoed byte (p50, p99). `requests` stays connected instead, a byte each way again and again: what it counts as
 * connections are requests answered, and its echo latency is from the request. Written in C because a Python client
 * is slower than what it would measure.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { EVENTS = 256, MOST_AT_ONCE = 4096 };
static const double PATIENCE = 5.0; /* seconds after which a connection counts as failed */

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void fail(const char *what) {
    fprintf(stderr, "connbench: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void watch(int poll, int op, int fd, uint32_t events, uint64_t data) {
    struct epoll_event event = {.events = events, .data.u64 = data};
    if (epoll_ctl(poll, op, fd, &event) != 0) fail("epoll_ctl");
}

/* --- server ------------------------------------------------------------------------------------------- */

static _Noreturn void serve(int port) {
    int listener = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    int on = 1, off = 0;
    struct sockaddr_in6 where = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port), .sin6_addr = in6addr_any};
    if (listener < 0) fail("socket");
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    setsockopt(listener, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    if (bind(listener, (struct sockaddr *)&where, sizeof where) != 0) fail("bind");
    if (listen(listener, 4096) != 0) fail("listen");
    int poll = epoll_create1(EPOLL_CLOEXEC);
    watch(poll, EPOLL_CTL_ADD, listener, EPOLLIN, (uint64_t)listener);
    for (;;) {
        struct epoll_event events[EVENTS];
        int count = epoll_wait(poll, events, EVENTS, -1);
        for (int i = 0; i < count; i++) {
            int fd = (int)events[i].data.u64;
            if (fd == listener) {
                int one;
                while ((one = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
                    setsockopt(one, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
                    watch(poll, EPOLL_CTL_ADD, one, EPOLLIN, (uint64_t)one);
                }
                continue;
            }
            char byte;
            ssize_t got = read(fd, &byte, 1);
            if (got == 1) {
                if (write(fd, &byte, 1) != 1) close(fd);
            } else if (got == 0 || (errno != EAGAIN && errno != EINTR)) {
                close(fd);
            }
        }
    }
}

/* --- client ------------------------------------------------------------------------------------------- */

struct connection {
    int fd;
    int connected;
    double begun;
};

struct latencies {
    float *values;
    size_t count, room;
};

static void add(struct latencies *into, double microseconds) {
    if (into->count == into->room) {
        into->room = into->room ? into->room * 2 : 65536;
        into->values = realloc(into->values, into->room * sizeof *into->values);
        if (into->values == NULL) fail("realloc");
    }
    into->values[into->count++] = (float)microseconds;
}

static int ascending(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static double quantile(struct latencies *of, double q) {
    if (of->count == 0) return 0;
    return of->values[(size_t)(q * (double)(of->count - 1))];
}

static struct sockaddr_storage target;
static socklen_t target_size;
static uint64_t failures;

static void begin(int poll, struct connection *all, uint64_t index) {
    struct connection *c = &all[index];
    int on = 1;
    c->connected = 0;
    c->begun = now();
    c->fd = socket(target.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) fail("socket");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (connect(c->fd, (struct sockaddr *)&target, target_size) != 0 && errno != EINPROGRESS) {
        if (errno != EADDRNOTAVAIL) fail("connect");
        failures++; /* out of ports for a moment: tried again when patience is over */
        close(c->fd);
        c->fd = -1;
        return;
    }
    watch(poll, EPOLL_CTL_ADD, c->fd, EPOLLOUT, index);
}

static void again(int poll, struct connection *all, uint64_t index) {
    if (all[index].fd >= 0) close(all[index].fd);
    begin(poll, all, index);
}

static void read_address(const char *text, int port) {
    struct sockaddr_in *v4 = (struct sockaddr_in *)&target;
    struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)&target;
    if (inet_pton(AF_INET, text, &v4->sin_addr) == 1) {
        v4->sin_family = AF_INET;
        v4->sin_port = htons((uint16_t)port);
        target_size = sizeof *v4;
    } else if (inet_pton(AF_INET6, text, &v6->sin6_addr) == 1) {
        v6->sin6_family = AF_INET6;
        v6->sin6_port = htons((uint16_t)port);
        target_size = sizeof *v6;
    } else {
        fprintf(stderr, "connbench: %s is no address\n", text);
        exit(2);
    }
}

static int drive(const char *address, int port, int at_once, double seconds, int stay) {
    static struct connection all[MOST_AT_ONCE];
    struct latencies connected = {0}, echoed = {0};
    read_address(address, port);
    int poll = epoll_create1(EPOLL_CLOEXEC);
    double start = now(), end = start + seconds, looked = start, last = start;
    for (int i = 0; i < at_once; i++) begin(poll, all, (uint64_t)i);
    while (last < end) {
        struct epoll_event events[EVENTS];
        int count = epoll_wait(poll, events, EVENTS, 50);
        for (int i = 0; i < count; i++) {
            uint64_t index = events[i].data.u64;
            struct connection *c = &all[index];
            double at = now();
            char byte = 'x';
            if (!c->connected) {
                int error = 0;
                socklen_t size = sizeof error;
                getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
                if (error != 0 || write(c->fd, &byte, 1) != 1) {
                    failures++;
                    again(poll, all, index);
                    continue;
                }
                c->connected = 1;
                add(&connected, (at - c->begun) * 1e6);
                watch(poll, EPOLL_CTL_MOD, c->fd, EPOLLIN, index);
            } else if (read(c->fd, &byte, 1) == 1) {
                add(&echoed, (at - c->begun) * 1e6);
                if (!stay) {
                    again(poll, all, index);
                    continue;
                }
                c->begun = at;
                if (write(c->fd, &byte, 1) != 1) {
                    failures++;
                    again(poll, all, index);
                }
            } else {
                failures++;
                again(poll, all, index);
            }
        }
        last = now();
        if (last - looked > 0.1) {
            for (int i = 0; i < at_once; i++) {
                if (last - all[i].begun > PATIENCE) {
                    failures++;
                    again(poll, all, (uint64_t)i);
                }
            }
            looked = last;
        }
    }
    double took = last - start;
    qsort(connected.values, connected.count, sizeof(float), ascending);
    qsort(echoed.values, echoed.count, sizeof(float), ascending);
    printf("{\"connections\": %zu, \"errors\": %llu, \"seconds\": %.6f, \"rate\": %.1f, "
           "\"connect_p50\": %.1f, \"connect_p99\": %.1f, \"echo_p50\": %.1f, \"echo_p99\": %.1f}\n",
           echoed.count, (unsigned long long)failures, took, (double)echoed.count / took, quantile(&connected, 0.50),
           quantile(&connected, 0.99), quantile(&echoed, 0.50), quantile(&echoed, 0.99));
    return 0;
}

int main(int argc, char **argv) {
    if (argc == 3 && strcmp(argv[1], "server") == 0) serve(atoi(argv[2]));
    int stay = argc == 6 && strcmp(argv[1], "requests") == 0;
    if (stay || (argc == 6 && strcmp(argv[1], "client") == 0)) {
        int at_once = atoi(argv[4]);
        if (at_once >= 1 && at_once <= MOST_AT_ONCE) return drive(argv[2], atoi(argv[3]), at_once, atof(argv[5]), stay);
    }
    fprintf(stderr, "usage: connbench server PORT | connbench client|requests ADDRESS PORT AT_ONCE SECONDS\n");
    return 2;
}
