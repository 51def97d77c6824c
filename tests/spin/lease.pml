/*
 * Leases: renewal, freeze, change of the committee, reclaim.
 *
 * A peer P holds addresses under a lease. It may go on while the lease lasts;
 * after the keepers have given its space back, it must have stopped.
 *
 * What is kept of the protocol (package ipam/register has it whole):
 *
 *  - P renews: a renewal has a nonce and goes to all keepers. When a majority
 *    of one committee has acknowledged it, the lease lasts H ticks from when it
 *    was sent. P's clock and that of a keeper may differ: at worst P goes on
 *    for H + DRIFT ticks of the keepers' time.
 *  - A keeper counts ticks of silence since it last acknowledged P, from when
 *    it learned that its committee was chosen. A restart may make it count
 *    from zero. At H + DRIFT it freezes P for good: it acknowledges no more.
 *  - When a majority of the committee has frozen P, its space is given back.
 *  - The committee may change once, from keepers 0, 1, 2 to 1, 2, 3: a
 *    majority of the first accepts that, and then keepers and P learn it, each
 *    in its own time. Who accepted and has not learned acknowledges nothing.
 *
 * What is left out: how the register agrees (register.pml has that), epochs
 * (P's next one is another P), and messages. A renewal or an acknowledgement
 * may arrive at any time after it was sent, or never, so it is enough to say
 * who has acknowledged what: acked. A renewal that P has given up for a later
 * one may still reach a keeper, but then does no more than end its silence,
 * as a restart does.
 *
 * Each event is one step, so that a state is nothing but the variables.
 *
 * With one of these the model leaves a guard out, and must then fail:
 *  FROM_RECEIPT   the lease runs from when the acknowledgements arrive
 *  NO_MARGIN      keepers freeze after H ticks of silence
 *  NO_MAJORITY    one keeper that has frozen P is enough
 *  ONE_ACK        one acknowledgement is enough
 *  ACK_FROZEN     a keeper acknowledges after it has frozen P
 *  FORGET_FREEZE  a restarted keeper does not know that it has frozen P
 *  ANY_COMMITTEE  P counts acknowledgements whatever committee they name
 *  ACK_ACCEPTED   a keeper that accepted another committee still acknowledges
 *  OLD_SILENCE    a keeper counts silence from before its committee was chosen
 */
#ifndef H
#define H 1
#endif
#ifndef DRIFT
#define DRIFT 1
#endif
#ifndef NONCES
#define NONCES 1
#endif

#define END (H + DRIFT)		/* P has stopped when its lease is so old */
#ifdef NO_MARGIN
#define LONG H			/* silence after which a keeper freezes P */
#else
#define LONG END
#endif
#define K 4

/* What a keeper knows of the committees, and what an acknowledgement names. */
#define NONE 0
#define FIRST 1
#define ACCEPTED 2		/* knows the first, and accepted the second */
#define SECOND 3

byte knows[K];
byte silence[K];		/* up to LONG */
bool frozen[K];
byte acked[NONCES * K];		/* by nonce and keeper: which committee it named */
byte age[NONCES];		/* ticks since the renewal was sent, up to END */
byte lease = END;		/* ticks since the renewal that it is from was sent, up to END */
byte last = 0;			/* nonce of the last renewal */
byte followed = FIRST;		/* committee that P knows */
bool given = false;		/* P's space is given back */

#define COUNT(v, c) ((v[0] == c) + (v[1] == c) + (v[2] == c) + (v[3] == c))
/* A majority of the first has accepted the second. Who has learned it may not
 * have accepted it: learning needs that it was chosen, so that is settled. */
#define CHOSEN (COUNT(knows, SECOND) > 0 || COUNT(knows, ACCEPTED) >= 2)
#define FROZEN(a, b, c) (frozen[a] + frozen[b] + frozen[c])
#define ACKS(n, c) ((acked[(n) * K] == c) + (acked[(n) * K + 1] == c) + (acked[(n) * K + 2] == c) + (acked[(n) * K + 3] == c))

#if defined(ONE_ACK)
#define ENOUGH(n) (ACKS(n, followed) >= 1)
#elif defined(ANY_COMMITTEE)
#define ENOUGH(n) (ACKS(n, FIRST) + ACKS(n, SECOND) >= 2)
#else
#define ENOUGH(n) (ACKS(n, followed) >= 2)
#endif

#ifdef NO_MAJORITY
#define NEEDED 1
#else
#define NEEDED 2
#endif

/* Keepers of the committee that k knows; 3 is none before it learned. */
#define KEEPS(k) (knows[k] == SECOND && k != 0 || knows[k] != SECOND && k != 3)

#ifdef OLD_SILENCE
#define COUNTS(k) true
#define SETTLE(k) skip
#else
#define COUNTS(k) KEEPS(k)
#define SETTLE(k) silence[k] = 0
#endif

#ifdef ACK_FROZEN
#define MAYACK(k) KEEPS(k)
#else
#define MAYACK(k) (KEEPS(k) && !frozen[k])
#endif

#ifdef ACK_ACCEPTED
#define NAMES(k) (knows[k] == ACCEPTED -> FIRST : knows[k])
#define SILENT(k) false
#else
#define NAMES(k) knows[k]
#define SILENT(k) (knows[k] == ACCEPTED)
#endif

#ifdef FORGET_FREEZE
#define RESTART(k) frozen[k] = false; silence[k] = 0
#else
#define RESTART(k) silence[k] = 0
#endif

#define SAFE assert(!given || lease == END)

active proctype all()
{
	byte k, n, i;

	atomic {
		knows[0] = FIRST; knows[1] = FIRST; knows[2] = FIRST; knows[3] = FIRST;
		n = 0;
		do
		:: n < NONCES -> age[n] = END; n++
		:: else -> break
		od;
		n = 0
	}
	do
	/* The committee changes: a keeper accepts that, one learns it, P does. */
	:: atomic {
		!given ->
		select(k : 0 .. 2);
		if
		:: knows[k] == FIRST -> knows[k] = ACCEPTED
		:: else
		fi;
		k = 0
	}
	:: atomic {
		!given && CHOSEN ->
		select(k : 0 .. 3);
		if
		:: knows[k] != SECOND -> knows[k] = SECOND; frozen[k] = false; SETTLE(k)
		:: else
		fi;
		k = 0
	}
	:: atomic { CHOSEN && followed == FIRST -> followed = SECOND }
	/* Time passes. */
	:: atomic {
		k = 0;
		do
		:: k < K -> if :: COUNTS(k) && silence[k] < LONG -> silence[k]++ :: else fi; k++
		:: else -> break
		od;
		n = 0;
		do
		:: n < NONCES -> if :: age[n] < END -> age[n]++ :: else fi; n++
		:: else -> break
		od;
		if :: lease < END -> lease++ :: else fi;
		k = 0; n = 0
	}
	/* P sends a renewal, and gives its oldest one up. */
	:: atomic {
		last = (last + 1) % NONCES; age[last] = 0;
		i = 0;
		do
		:: i < K -> acked[last * K + i] = NONE; i++
		:: else -> break
		od;
		i = 0
	}
	/* A renewal arrives at a keeper, which acknowledges it. Without one that
	 * was sent lately nothing comes of it but the end of a silence. */
	:: atomic {
		select(k : 0 .. 3); select(n : 0 .. NONCES - 1);
		if
		:: MAYACK(k) && !SILENT(k) -> silence[k] = 0; acked[n * K + k] = NAMES(k)
		:: else
		fi;
		k = 0; n = 0
	}
	/* P has heard enough. */
	:: atomic {
		select(n : 0 .. NONCES - 1);
		if
#ifdef FROM_RECEIPT
		:: ENOUGH(n) -> lease = 0
#else
		:: ENOUGH(n) && age[n] < lease -> lease = age[n]
#endif
		:: else
		fi;
		n = 0; SAFE
	}
	/* A keeper freezes P. */
	:: atomic {
		select(k : 0 .. 3);
		if
		:: KEEPS(k) && silence[k] >= LONG -> frozen[k] = true
		:: else
		fi;
		k = 0
	}
	/* A keeper is started anew. */
	:: atomic { select(k : 0 .. 3); RESTART(k); k = 0 }
	/* The register gives P's space back, in a version that follows the one
	 * which names the committee: no other change came between. */
	:: atomic {
		!given && !CHOSEN && FROZEN(0, 1, 2) >= NEEDED ||
		!given && CHOSEN && (frozen[1] && knows[1] == SECOND) + (frozen[2] && knows[2] == SECOND) + frozen[3] >= NEEDED ->
		given = true; SAFE
	}
	od
}
