/* Work on several threads. */
#ifndef THREADS_H
#define THREADS_H

#define THREADS_MOST 64

/* One piece of `work`, done by the thread of that index (0: the caller). */
typedef void (*piece)(void *work, long index, long thread);

#define PIECES_MOST 65535

/* function(work, i, thread) for every i below `pieces`, on up to `threads` threads; returns when all are done. Where another
   caller has the team, or there are more than PIECES_MOST pieces, this one works alone. */
void spread(piece function, void *work, long pieces, long threads);

#endif
