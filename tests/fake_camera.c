/* A camera that is none: loaded before a program (LD_PRELOAD), it answers for /dev/video77 as a V4L2 driver does.
 * YUYV, 128x96 whatever is asked for, 30 frames a second, each brighter than the one before; the third of every
 * seven comes damaged. After FAKE_FRAMES of them it is unplugged. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/videodev2.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { WIDTH = 128, HEIGHT = 96, BYTES = WIDTH * HEIGHT * 2, PLACE = (BYTES + 4095) / 4096 * 4096, BUFFERS = 8 };

static int camera = -1, frames, queued[BUFFERS], head, tail;

static int open_camera(void) {
    camera = memfd_create("camera", 0);
    return ftruncate(camera, (off_t)BUFFERS * PLACE) ? -1 : camera;
}

#define OPEN(NAME)                                                  \
    int NAME(const char *path, int flags, ...) {                    \
        int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, #NAME); \
        va_list rest;                                               \
        va_start(rest, flags);                                      \
        int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, int) : 0; \
        va_end(rest);                                               \
        return !strcmp(path, "/dev/video77") ? open_camera() : real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

static int refuse(int reason) {
    errno = reason;
    return -1;
}

static int tell_format(struct v4l2_format *format) {
    struct v4l2_pix_format *picture = &format->fmt.pix;
    picture->width = WIDTH, picture->height = HEIGHT, picture->pixelformat = V4L2_PIX_FMT_YUYV;
    picture->field = V4L2_FIELD_NONE, picture->bytesperline = WIDTH * 2, picture->sizeimage = BYTES;
    return 0;
}

static int give_frame(struct v4l2_buffer *buffer) {
    static char picture[BYTES];
    struct timespec now;
    usleep(33000);
    if (frames >= atoi(getenv("FAKE_FRAMES"))) return refuse(ENODEV);
    if (head == tail) return refuse(EAGAIN);
    buffer->index = queued[head++ % BUFFERS];
    for (int at = 0; at < BYTES; at++) picture[at] = at & 1 ? 128 : 20 + frames * 5 % 200;
    if (pwrite(camera, picture, BYTES, (off_t)buffer->index * PLACE) != BYTES) return refuse(EIO);
    clock_gettime(CLOCK_MONOTONIC, &now);
    buffer->timestamp.tv_sec = now.tv_sec, buffer->timestamp.tv_usec = now.tv_nsec / 1000;
    buffer->bytesused = BYTES, buffer->flags = frames % 7 == 2 ? V4L2_BUF_FLAG_ERROR : 0, buffer->sequence = frames++;
    return 0;
}

int ioctl(int file, unsigned long request, ...) {
    va_list rest;
    va_start(rest, request);
    void *told = va_arg(rest, void *);
    va_end(rest);
    if (file != camera || camera < 0) {
        int (*real)(int, unsigned long, ...) = dlsym(RTLD_NEXT, "ioctl");
        return real(file, request, told);
    }
    switch ((unsigned)request) {
    case (unsigned)VIDIOC_QUERYCAP:
        ((struct v4l2_capability *)told)->capabilities = V4L2_CAP_VIDEO_CAPTURE | V4L2_CAP_STREAMING;
        return 0;
    case (unsigned)VIDIOC_ENUMINPUT: return ((struct v4l2_input *)told)->index ? refuse(EINVAL) : 0;
    case (unsigned)VIDIOC_G_INPUT: *(int *)told = 0; return 0;
    case (unsigned)VIDIOC_G_FMT:
    case (unsigned)VIDIOC_S_FMT: return tell_format(told);
    case (unsigned)VIDIOC_G_PARM:
        ((struct v4l2_streamparm *)told)->parm.capture.timeperframe = (struct v4l2_fract){1, 30};
        return 0;
    case (unsigned)VIDIOC_REQBUFS: ((struct v4l2_requestbuffers *)told)->count = BUFFERS; return 0;
    case (unsigned)VIDIOC_QUERYBUF:
        ((struct v4l2_buffer *)told)->length = BYTES;
        ((struct v4l2_buffer *)told)->m.offset = ((struct v4l2_buffer *)told)->index * PLACE;
        return 0;
    case (unsigned)VIDIOC_QBUF: queued[tail++ % BUFFERS] = ((struct v4l2_buffer *)told)->index; return 0;
    case (unsigned)VIDIOC_DQBUF: return give_frame(told);
    case (unsigned)VIDIOC_S_INPUT:
    case (unsigned)VIDIOC_S_PARM:
    case (unsigned)VIDIOC_STREAMON:
    case (unsigned)VIDIOC_STREAMOFF:
    case (unsigned)VIDIOC_SUBSCRIBE_EVENT: return 0;
    default: return refuse(EINVAL);
    }
}
